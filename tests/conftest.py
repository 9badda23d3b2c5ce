"""Every test sees eight fake CPU devices and full float32 products.

Compilation is most of a test's time, so LLVM optimises little.
"""

import os

# Must be set before JAX is imported: the device count is fixed at start-up.
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=8"
  + " --xla_backend_optimization_level=0"
  + " --xla_llvm_disable_expensive_passes=true"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_default_matmul_precision", "highest")
