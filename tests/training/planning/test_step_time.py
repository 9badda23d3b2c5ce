# ruff: noqa: E501 (lines as XLA prints them)
"""The predicted time of small scheduled programs, against sums by hand."""

import pytest

from sft_jax.common.flops import CHIPS
from sft_jax.training.planning import step_time

V5E = CHIPS["TPU v5e"]
CLOCK = step_time.CLOCKS["TPU v5e"]

PROGRAM = """HloModule jit_step, is_scheduled=true, num_partitions=4

FileNames
1 "/somewhere/sft_jax/models/linear.py"
2 "/somewhere/jax/_src/api.py"

FunctionNames
1 "multiply"
2 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=110 end_line=110 column=1}
2 {file_name_id=2 function_name_id=2 line=9 end_line=9 column=1}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}


%product (p0: bf16[256,512], p1: bf16[512,128]) -> bf16[256,128] {
  %p0 = bf16[256,512]{1,0} parameter(0)
  %p1 = bf16[512,128]{1,0} parameter(1)
  ROOT %dot.1 = bf16[256,128]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf, metadata={op_name="jit(step)/jvp(layers)/Block/mlp/up/dot_general" stack_frame_id=2}
}

%body (arg: (s32[], bf16[256,512])) -> (s32[], bf16[256,512]) {
  %arg = (s32[], bf16[256,512]{1,0}) parameter(0)
  %x = bf16[256,512]{1,0} get-tuple-element(%arg), index=1
  %w = bf16[512,128]{1,0} constant({...})
  %fusion.1 = bf16[256,128]{1,0} fusion(%x, %w), kind=kOutput, calls=%product, backend_config={"estimated_cycles":"1500"}
  %again = bf16[256,512]{1,0} fusion(%x), kind=kLoop, calls=%silu, metadata={op_name="jit(step)/transpose(jvp(layers))/rematted_computation/Block/mlp/silu"}, backend_config={"estimated_cycles":"600"}
  ROOT %out = (s32[], bf16[256,512]{1,0}) tuple(%x, %again)
}

%silu (p: bf16[256,512]) -> bf16[256,512] {
  ROOT %p = bf16[256,512]{1,0} parameter(0)
}

%condition (arg.1: (s32[], bf16[256,512])) -> pred[] {
  %arg.1 = (s32[], bf16[256,512]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg.1), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %three), direction=LT
}

ENTRY %main (a: bf16[256,512], t: f32[1000,64], i: s32[32]) -> f32[32,64] {
  %a = bf16[256,512]{1,0} parameter(0)
  %t = f32[1000,64]{1,0} parameter(1)
  %i.1 = s32[32]{0} parameter(2)
  %start = (f32[250,64]{1,0}, f32[1000,64]{1,0}) all-gather-start(%t), replica_groups=[1,4]<=[4], dimensions={0}
  %add.1 = bf16[256,512]{1,0} add(%a, %a), metadata={op_name="jit(step)/optimizer/add"}, backend_config={"estimated_cycles":"150"}
  %done = f32[1000,64]{1,0} all-gather-done(%start)
  %tuple.1 = (s32[], bf16[256,512]{1,0}) tuple(%i.1, %add.1)
  %while.1 = (s32[], bf16[256,512]{1,0}) while(%tuple.1), condition=%condition, body=%body
  %splash_mha_fwd.1 = bf16[1,2,1024,128]{3,2,1,0} custom-call(%a, %a), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,2,2]{2,1,0}, bf16[1,2,1024,128]{3,2,1,0}, bf16[1,1,1024,128]{3,2,1,0}}, metadata={op_name="jit(step)/jvp(layers)/Block/attn/attention/splash"}
  ROOT %gather.1 = f32[32,64]{1,0} gather(%done, %i.1), metadata={op_name="jit(step)/jvp(embed)/gather"}
}
"""


@pytest.fixture(scope="module")
def found():
  return step_time.predict(PROGRAM, V5E)


def test_each_kind_of_operation(found):
  kinds = {kind: seconds for (kind,), seconds in found.by("kind").items()}
  # Three trips of the loop.
  assert kinds["products"] == pytest.approx(3 * 1500 / CLOCK)
  assert kinds["others"] == pytest.approx((3 * 600 + 150) / CLOCK)
  # Of 4 devices three send 250 x 64 floats, and an addition hides a part.
  sent = 3 * 250 * 64 * 4 / V5E.links
  assert found.links == pytest.approx(sent, rel=0.01)
  assert kinds["collectives"] == pytest.approx(sent - 150 / CLOCK, rel=0.02)
  # 2 x 2 products of two heads, T = 1024 in 2 blocks: 3 of 4 are computed.
  flops = 4 * 2 * 1024 * 1024 * 128 * 0.75
  assert kinds["kernels"] == pytest.approx(flops / V5E.flops / 0.5)
  # What is gathered is read and written.
  assert kinds["moves"] == pytest.approx(2 * 32 * 64 * 4 / V5E.bandwidth)
  assert found.seconds == pytest.approx(sum(kinds.values()))


def test_parts_phases_and_sources(found):
  by = found.by("part", "phase")
  assert by["MLP", "forward"] == pytest.approx(3 * 1500 / CLOCK)
  assert by["MLP", "recompute"] == pytest.approx(3 * 600 / CLOCK)
  assert ("attention kernel", "forward") in by
  assert ("optimizer", "outside") in by
  product = next(one for one in found.operations if one.kind == "products")
  assert (product.source, product.times) == ("models/linear.py:110", 3)
  assert product.flops == 3 * 2 * 256 * 512 * 128
  assert found.operations[0].seconds == max(x.seconds for x in found.operations)


def test_the_head_works_off_as_many_chunks_as_it_is_told():
  text = PROGRAM.replace("direction=LT", "direction=GT").replace(
    "body=%body", 'body=%body, metadata={op_name="jit(step)/jvp(loss_head)/w"}'
  )
  once, five = (
    step_time.predict(text, V5E, loss_chunks=n).by("kind")[("products",)]
    for n in (1, 5)
  )
  assert (once, five) == pytest.approx((1500 / CLOCK, 5 * 1500 / CLOCK))


@pytest.mark.parametrize(
  ("line", "flops"),
  [
    # A weight's gradient: summed over the batch, which stands as the features.
    (
      "%c = f32[512,128]{1,0} convolution(%x, %y), dim_labels=fb_io->bf",
      2 * 512 * 128 * 256,
    ),
    # A batch of 8, written as a window of 8 of which one tap meets each.
    (
      "%c = f32[8,64,32]{2,1,0} convolution(%b, %d), window={size=8 pad=0_0 "
      "stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf",
      2 * 8 * 64 * 32 * 16,
    ),
  ],
)
def test_flops_of_products_written_as_convolutions(line, flops):
  lines = f"""HloModule m

ENTRY %main (x: bf16[256,512]) -> f32[512,128] {{
  %x = bf16[256,512]{{1,0}} parameter(0)
  %y = bf16[256,128]{{1,0}} parameter(1)
  %b = bf16[8,64,16]{{2,1,0}} parameter(2)
  %d = bf16[8,16,32]{{2,1,0}} parameter(3)
  {line}, backend_config={{"estimated_cycles":"10"}}
}}
"""
  (one,) = step_time.predict(lines, V5E).operations
  assert one.flops == flops


def test_a_chip_without_a_known_clock_is_refused():
  with pytest.raises(ValueError, match="'H100 SXM', expected one of"):
    step_time.predict(PROGRAM, CHIPS["H100"])
