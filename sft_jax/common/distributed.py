"""Many hosts: joining into one run, agreeing, and ending together.

Every process runs the same program on its own devices and rows; the first one
writes what people read. A process that dies takes the others with it, within a
minute, and they name it (`lifeline`).
"""

import collections
import contextlib
import importlib.util
import itertools
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Container, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sft_jax.common import lifeline, meeting

# Seconds without a sign of life after which JAX ends all processes: half of
# it has to be more than the lifeline's silence, which names who gave none (of
# 45 s, JAX took 31).
_HEARTBEAT = 100
# Seconds in which it names a process for want of which a sum has failed.
_NEWS = 5
# Seconds that processes at their end wait for one another.
_SHUTDOWN = 30
_NAMES = ("coordinator_address", "num_processes", "process_id")
# Where the first pod of a Kubernetes job listens.
_PORT = 55527


@contextlib.contextmanager
def joined(
  coordinator: str = "",
  processes: int = 0,
  process: int = -1,
  *,
  together: Container[int] = (0,),
) -> Iterator[None]:
  """Within, this process is one of the run's; call it before all else of JAX.

  With no arguments, the processes of a TPU pod, a SLURM step, an Open MPI or
  an indexed Kubernetes job (a JobSet's) find one another; where there is none
  of these, or Pathways brings all devices to one process, it is alone.

  Args:
    coordinator: host:port of the first process, which others can reach.
    together: exit codes that all processes come to, and wait for one another.
      With any other this one ends at once.

  Raises ValueError: some of the three and not all; or see `meeting.meet` and
  `start_pathways`.
  """
  given = (bool(coordinator), processes > 0, process >= 0)
  if any(given) and not all(given):
    raise ValueError(
      f"--coordinator, --processes, --process: got {coordinator!r}, "
      f"{processes} and {process}, expected all or none. Give the others."
    )
  pathways = start_pathways()
  if pathways and any(given):
    raise ValueError(
      f"--coordinator: got {coordinator!r} with JAX_PLATFORMS=proxy, expected "
      "none: of Pathways one process has all devices. Start one, without it."
    )
  who = None if pathways or all(given) else _detected()
  if who is None and not all(given):
    yield
    return
  # JAX's service takes SIGTERM from Python, hears no other signal, and knows
  # nothing but steps: a run that loads would not end. `Agreement` has a signal
  # stop all processes after the same step without it.
  jax.config.update("jax_enable_preemption_service", False)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  if who is None:
    who = {"coordinator_address": coordinator, "num_processes": processes}
    who |= {"process_id": process}
  elif not who:
    who = _found_by_jax()
  address, count, number = (who[name] for name in _NAMES)
  meeting.meet(address, number, count)
  jax.distributed.initialize(
    **who,
    # Else SLURM's variables would tell it which devices are its own.
    cluster_detection_method="deactivate",
    heartbeat_timeout_seconds=_HEARTBEAT,
    shutdown_timeout_seconds=_SHUTDOWN,
  )
  line = _lifeline()
  try:
    yield
  except SystemExit as ending:
    code = ending.code if isinstance(ending.code, int) else 1
    if isinstance(ending, EndsAlone) and line:
      line.leave("stopped by a signal", code)
    if isinstance(ending, EndsAlone) or code not in together:
      _leave(code)
    _part(line)
    raise
  except BaseException as error:
    if isinstance(error, jax.errors.JaxRuntimeError):
      time.sleep(_NEWS)
    traceback.print_exc()
    _leave(1)
  _part(line)


def start_pathways() -> bool:
  """Whether JAX_PLATFORMS names Pathways' proxy, which JAX then can start.

  One process has the devices of all hosts, and is its run's only one.

  Raises ValueError: pathwaysutils, which JAX needs for it, is not installed.
  """
  platforms = jax.config.values["jax_platforms"] or ""
  if "proxy" not in platforms.split(","):
    return False
  try:
    import pathwaysutils  # pyright: ignore
  except ImportError as error:
    raise ValueError(
      f"JAX_PLATFORMS: got {platforms!r}, expected the package pathwaysutils "
      f"beside it ({error}). pip install pathwaysutils, or unset JAX_PLATFORMS."
    ) from error
  pathwaysutils.initialize()
  return True


class EndsAlone(SystemExit):
  """This process does not wait for the others, which end with its code."""


def _part(line: lifeline.Lifeline | None) -> None:
  """Ends with all others."""
  jax.distributed.shutdown()
  if line:
    line.close()


def _lifeline() -> lifeline.Lifeline | None:
  """Opens this process's, or says that it has none."""
  state = _state()
  host = str(state.coordinator_address).rpartition(":")[0].strip("[]")
  try:
    return lifeline.Lifeline(
      state.client, state.process_id, state.num_processes, host
    )
  except OSError as error:
    print(
      f"warning: process {state.process_id} cannot reach the first one on "
      f"{host} at a port of its choice ({error}): if a process dies, JAX ends "
      "this one without its name.",
      file=sys.stderr,
    )
    return None


def _detected() -> dict[str, Any] | None:
  """What JAX must be told to join the processes of a cluster; None = alone.

  Raises:
    ValueError: a pod of an indexed Job that cannot tell how many there are.
  """
  # JAX looks by itself, but only where it knows that there is something.
  from jax._src.clusters import ClusterEnv, K8sCluster

  for env in ClusterEnv._cluster_types:
    if env.opt_in_only_method or env is K8sCluster:
      continue
    if env.is_env_present():
      return {} if env.get_process_count() > 1 else None
  # A pod that belongs to no indexed Job is alone, and asks nobody.
  index = os.environ.get("JOB_COMPLETION_INDEX")
  if index is None or "KUBERNETES_SERVICE_HOST" not in os.environ:
    return None
  count = os.environ.get("JAX_NUM_PROCESSES")
  where = f"hosts: pod {index} of an indexed Job"
  if count is None:
    if not importlib.util.find_spec("kubernetes"):
      raise ValueError(
        f"{where}: got no number of its pods, expected JAX_NUM_PROCESSES (1 "
        "where it is alone), or the kubernetes package to ask for it. Set it "
        "in the pod's env, or pip install kubernetes."
      )
    try:
      several = K8sCluster.is_env_present() and K8sCluster.get_process_count()
    except Exception as error:  # Of its client, which is not installed here.
      said = " ".join(str(error).split())[:300]
      raise ValueError(
        f"{where}: Kubernetes did not say how many pods there are ({said}), "
        "expected a service account that may read pods and jobs. Give it the "
        "right, or set JAX_NUM_PROCESSES in the pod's env."
      ) from error
    return {} if several and several > 1 else None
  if int(count) == 1:
    return None
  # 'job-3.subdomain.namespace...': the first pod is 'job-0.subdomain'.
  host, _, domain = socket.getfqdn().partition(".")
  address = os.environ.get("JAX_COORDINATOR_ADDRESS")
  if not address and not domain:
    raise ValueError(
      f"{where}: got the host name {host!r} without a subdomain, expected "
      "that of a headless service, by which pods find one another. Set "
      "spec.template.spec.subdomain, or JAX_COORDINATOR_ADDRESS."
    )
  return {
    "coordinator_address": address
    or f"{host.removesuffix(index)}0.{domain.split('.')[0]}:{_PORT}",
    "num_processes": int(count),
    "process_id": int(os.environ.get("JAX_PROCESS_ID", index)),
  }


def _found_by_jax() -> dict[str, Any]:
  from jax._src.clusters import ClusterEnv

  found = ClusterEnv.auto_detect_unset_distributed_params(
    *(None, None, None, None, None, int(meeting.PATIENCE))
  )
  return dict(zip((*_NAMES, "local_device_ids"), found, strict=True))


def _leave(code: int) -> None:
  """Ends this process at once: at the usual end it would wait for others."""
  state = _state()  # To ask for devices may take the others, too.
  print(
    f"process {state.process_id} of {state.num_processes} ends with code "
    f"{code}; the others cannot continue without it.",
    file=sys.stderr,
  )
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


_turns = itertools.count()


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
  """The first process does it, then all others at once.

  For what is made once, in a folder that processes may share: those who come
  later find it there, and make it for themselves where they do not share.
  """
  if jax.process_count() == 1:
    yield
    return
  name, first = f"sft_jax first_alone {next(_turns)}", not jax.process_index()
  if not first:
    _first_has(name)
  yield
  if first:
    _client().key_value_set(name, "")


def own_rows(total: int) -> range:
  """This process's part of what processes read together."""
  i, n = jax.process_index(), jax.process_count()
  return range(i * total // n, (i + 1) * total // n)


def barrier(name: str) -> None:
  """Waits until every process of the run is here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def first_says(value: Any, process: int = 0) -> Any:
  """What the first process gives here, as JSON has it; every process calls it.

  It goes by way of the coordinator, and waits for that process alone; perhaps
  another one.
  """
  text, name = json.dumps(value), f"sft_jax first_says {next(_turns)}"
  if jax.process_index() != process:
    text = _first_has(name)
  elif jax.process_count() > 1:
    _client().key_value_set(name, text)
  return json.loads(text)


def all_say(value: Any) -> list[Any]:
  """What each process gives here, as JSON has it; every process calls it."""
  turn, me, text = next(_turns), jax.process_index(), json.dumps(value)
  if jax.process_count() > 1:
    _client().key_value_set(f"sft_jax all_say {turn} {me}", text)
  return [
    json.loads(text if i == me else _first_has(f"sft_jax all_say {turn} {i}"))
    for i in range(jax.process_count())
  ]


def _first_has(name: str) -> str:
  """What a process sets, the first of which may encode the data before.

  Each second Python hears of signals.
  """
  while True:
    try:
      return _client().blocking_key_value_get(name, 1000)
    except jax.errors.JaxRuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise


def _client() -> Any:
  """The connection to the coordinator."""
  return _state().client


def _state() -> Any:
  """Which process this is; JAX has no public name for it."""
  from jax._src import distributed

  return distributed.global_state


class Agreement:
  """A wish of any process, known to all of them at the same step.

  The wishes meet on the devices, in a small program behind each step's, and
  are read a few steps later, when they are there: nobody waits.
  """

  def __init__(self, mesh: Mesh | None, *, behind: int):
    """`behind`: after how many further calls a wish is read."""
    self._alone = jax.process_count() == 1
    if self._alone or mesh is None:
      return
    self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    self._size, self._behind = mesh.size, behind
    self._any = jax.jit(
      lambda wishes: wishes.any(),
      out_shardings=NamedSharding(mesh, PartitionSpec()),
    )
    self._asked = collections.deque()

  def __call__(self, wish: bool) -> bool:
    """Whether any process had the wish `behind` calls ago; alone: now.

    Every process calls it as often.
    """
    if self._alone:
      return wish
    wishes = jax.make_array_from_callback(
      (self._size,), self._sharding, lambda index: np.full(1, wish)
    )
    self._asked.append(self._any(wishes))
    if len(self._asked) <= self._behind:
      return False
    return bool(self._asked.popleft())
