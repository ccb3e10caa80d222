"""Costs counted in a compiled program's text, against numbers worked by hand."""

import pytest

from psa_jax.training import hlo
from psa_jax.training.chips import CHIPS
from psa_jax.training.compiled_cost import cost_of, kernel_seconds, phase_of, scope_of

RECORDED = """HloModule jit_f, is_scheduled=true

FileNames
1 "/home/me/lib/site-packages/jax/experimental/pallas/ops/tpu/splash_attention_kernel.py"
2 "/home/me/psa_jax/models/attention.py"
3 "/home/me/probe.py"

FunctionNames
1 "splash_attention"
2 "body"

FileLocations
1 {file_name_id=1 function_name_id=1 line=199 end_line=199 column=9 end_column=9}
2 {file_name_id=2 function_name_id=2 line=14 end_line=14 column=28 end_column=28}
3 {file_name_id=3 function_name_id=2 line=5 end_line=5 column=2 end_column=2}

StackFrames
1 {file_location_id=3 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=1 parent_frame_id=3}


%fused_computation.1 (param_0: bf16[80,80], param_1: bf16[1024,80]) -> bf16[1024,80] {
  %param_1 = bf16[1024,80]{0,1:T(8,128)(2,1)S(1)} parameter(1)
  %param_0 = bf16[80,80]{1,0:T(8,128)(2,1)} parameter(0)
  %convolution.6 = bf16[1024,80]{0,1:T(8,128)(2,1)} convolution(%param_1, %param_0), dim_labels=bf_io->bf, \
metadata={op_name="jit(f)/jvp()/while/body/closed_call/unet/dot_general" stack_frame_id=2}, backend_config={"window_config":{"estimated_cycles":"9999"}}
  ROOT %tanh.5 = bf16[1024,80]{0,1:T(8,128)(2,1)S(1)} tanh(%convolution.6)
}

%body.1 (wide.param.2: (s32[], bf16[1024,80], bf16[80,80])) -> (s32[], bf16[1024,80], bf16[80,80]) {
  %constant.48 = s32[]{:T(128)} constant(1)
  %wide.param.2 = (s32[]{:T(128)}, bf16[1024,80]{0,1:T(8,128)(2,1)S(1)}, /*index=2*/bf16[80,80]{1,0:T(8,128)(2,1)}) parameter(0)
  %get-tuple-element.362 = s32[]{:T(128)} get-tuple-element(%wide.param.2), index=0
  %get-tuple-element.363 = bf16[1024,80]{0,1:T(8,128)(2,1)S(1)} get-tuple-element(%wide.param.2), index=1
  %get-tuple-element.364 = bf16[80,80]{1,0:T(8,128)(2,1)} get-tuple-element(%wide.param.2), index=2
  %fusion.6 = bf16[1024,80]{0,1:T(8,128)(2,1)S(1)} fusion(%get-tuple-element.364, %get-tuple-element.363), kind=kOutput, calls=%fused_computation.1, \
metadata={op_name="jit(f)/jvp()/while/body/closed_call/unet/tanh" stack_frame_id=2}, backend_config={"window_config":{"estimated_cycles":"4723"}}
  %add.27 = s32[]{:T(128)} add(%get-tuple-element.362, %constant.48), metadata={op_name="jit(f)/jvp()/while/body/add"}
  ROOT %tuple.70 = (s32[]{:T(128)}, bf16[1024,80]{0,1:T(8,128)(2,1)S(1)}, bf16[80,80]{1,0:T(8,128)(2,1)}) tuple(%add.27, %fusion.6, %get-tuple-element.364)
}

%condition.1 (wide.param.1: (s32[], bf16[1024,80], bf16[80,80])) -> pred[] {
  %constant.51 = s32[]{:T(128)} constant(20)
  %wide.param.1 = (s32[]{:T(128)}, bf16[1024,80]{0,1:T(8,128)(2,1)S(1)}, bf16[80,80]{1,0:T(8,128)(2,1)}) parameter(0)
  %get-tuple-element.284 = s32[]{:T(128)} get-tuple-element(%wide.param.1), index=0
  ROOT %lt.11 = pred[]{:T(512)} compare(%get-tuple-element.284, %constant.51), direction=LT
}

ENTRY %main.1 (param: bf16[80,80], param.1: bf16[1024,80]) -> bf16[80,80] {
  %constant.57 = s32[]{:T(128)} constant(0)
  %param = bf16[80,80]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="frozen[\\'kernel\\']"}
  %param.1 = bf16[1024,80]{1,0:T(8,128)(2,1)} parameter(1)
  %copy.28 = s32[]{:T(128)} copy(%constant.57)
  %copy.55 = bf16[1024,80]{0,1:T(8,128)(2,1)S(1)} copy(%param.1), backend_config={"window_config":{"estimated_cycles":"2522"}}
  %tuple.68 = (s32[]{:T(128)}, bf16[1024,80]{0,1:T(8,128)(2,1)S(1)}, bf16[80,80]{1,0:T(8,128)(2,1)}) tuple(%copy.28, %copy.55, %param)
  %while.32 = (s32[]{:T(128)}, bf16[1024,80]{0,1:T(8,128)(2,1)S(1)}, bf16[80,80]{1,0:T(8,128)(2,1)}) while(%tuple.68), condition=%condition.1, body=%body.1
  %get-tuple-element.176 = bf16[1024,80]{0,1:T(8,128)(2,1)S(1)} get-tuple-element(%while.32), index=1
  %bitcast.78 = bf16[1,2,40,1024]{3,2,1,0:T(8,128)(2,1)S(1)} bitcast(%get-tuple-element.176)
  %broadcast.5 = s8[1,2,1]{2,1,0:T(8,128)(4,1)S(1)} broadcast(%constant.57), dimensions={}
  %splash_mha_fwd_residuals.1 = (bf16[1,2,1024,40]{3,2,1,0:T(8,128)(2,1)S(1)}, f32[1,2,1024,128]{3,2,1,0:T(8,128)S(1)}) custom-call(%broadcast.5, %broadcast.5, %bitcast.78, %bitcast.78, %bitcast.78), \
custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/jvp()/shard_map/attention/splash_mha_fwd_residuals/pallas_call" stack_frame_id=3}
  %get-tuple-element.181 = bf16[1,2,1024,40]{3,2,1,0:T(8,128)(2,1)S(1)} get-tuple-element(%splash_mha_fwd_residuals.1), index=0
  %splash_mha_dkv_no_residuals.1 = (bf16[1,1,2,1024,40]{4,3,2,1,0}, bf16[1,2,1024,40]{3,2,1,0}, bf16[1,2,1024,40]{3,2,1,0}) custom-call(%broadcast.5, %broadcast.5, %bitcast.78, %bitcast.78, %bitcast.78, /*index=5*/%get-tuple-element.181), \
custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/transpose(jvp())/shard_map/attention/splash_mha_dkv_no_residuals/pallas_call" stack_frame_id=3}
  %custom-call = bf16[80,80]{1,0:T(8,128)(2,1)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %all-reduce.1 = bf16[80,80]{1,0:T(8,128)(2,1)} all-reduce(%custom-call), channel_id=2, to_apply=%add.clone
}
"""  # noqa: E501
"""Shortened from what libtpu 0.0.42.1 made of a scan of products, splash attention and a gradient, for v5e:2x2."""


def test_a_recorded_program():
    cost = cost_of(RECORDED)
    assert cost.cycles == 2522 + 20 * 4723  # not the 9,999 inside the fusion
    products = 20 * 2 * 1024 * 80 * 80
    attention = 2 * 2 * 1024 * 1024 * 40  # FLOP of one product of [rows, keys] by 40, of two heads
    assert cost.flops == products + (2 + 5) * attention
    assert cost.useful_flops == products + (2 + 4) * attention
    assert cost.kernel_flops == (2 + 5) * attention // 40 * 128  # heads of 40 are padded to 128
    assert cost.collectives == {"all-reduce": (1, 80 * 80 * 2)}
    assert cost.unknown_loops == cost.unknown_kernels == ()
    assert cost.by(lambda row: row.kind) == {"dense": 20 * 4723, "other": 2522}
    assert cost.by(lambda row: row.phase) == {"forward": 20 * 4723, "other": 2522}
    assert cost.by(lambda row: row.scope) == {"unet": 20 * 4723, "other": 2522}
    assert [row.kind for row in cost.rows if row.is_kernel] == ["attention"] * 2
    assert [row.phase for row in cost.rows if row.is_kernel] == ["forward", "backward"]
    lines = {row.name: row.source for row in cost.rows}
    assert lines["fusion.6"] == lines["splash_mha_fwd_residuals.1"] == "models/attention.py:14"
    v5e = CHIPS["v5e"]
    by_hand = 96_982 / 1.5e9 + 7 * attention / 40 * 128 / 98.5e12
    assert cost.seconds(v5e.clock, v5e.peak) == pytest.approx(by_hand)
    assert kernel_seconds(985, 197.0) == 10.0


def test_a_kernel_of_a_single_picture_has_no_axis_for_it():
    assert cost_of(RECORDED.replace("[1,2,40,1024]", "[2,40,1024]")) == cost_of(RECORDED)


def test_a_kernel_that_has_kept_its_name_alone():
    bare = "\n".join(
        line.split(", metadata=")[0] if "tpu_custom_call" in line else line for line in RECORDED.splitlines()
    )
    kernels = [row for row in cost_of(bare).rows if row.is_kernel]
    assert [(row.kind, row.phase, row.source) for row in kernels] == [
        ("attention", "forward", ""),
        ("attention", "backward", ""),
    ]


@pytest.mark.parametrize(
    ("change", "cycles", "unknown"),
    [
        ("constant(20)", 2522 + 20 * 4723, ()),
        ("constant(7)", 2522 + 7 * 4723, ()),
        ("parameter(1)", 2522 + 4723, ("while.32",)),  # the end is no constant
    ],
)
def test_trips_of_a_loop(change, cycles, unknown):
    cost = cost_of(RECORDED.replace("constant(20)", change))
    assert (cost.cycles, cost.unknown_loops) == (cycles, unknown)


def test_a_loop_that_says_its_trips():
    said = RECORDED.replace("body=%body.1", 'body=%body.1, backend_config={"known_trip_count":{"n":"3"}}')
    assert cost_of(said).cycles == 2522 + 3 * 4723


@pytest.mark.parametrize(
    ("image", "kernel", "made", "attributes", "flops"),
    [
        # 3 × 3 with a border: along a side of 4 pixels 4 + 3 + 3 pairs of pixel and weight.
        (
            "2,4,4,5",
            "3,3,5,7",
            "2,4,4,7",
            "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
            2 * 2 * 35 * 100,
        ),
        # Every other pixel of 4: places 0 and 2, of which the first lacks a neighbour.
        (
            "1,4,4,5",
            "3,3,5,7",
            "1,2,2,7",
            "window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
            2 * 35 * 25,
        ),
        # A product for each of 16 rows, as the compiler writes it: all but a sixteenth are holes of the dilation.
        (
            "16,8,20",
            "16,20,9",
            "16,8,9",
            "window={size=16 stride=15 lhs_dilate=16}, dim_labels=0bf_0io->0bf",
            2 * 16 * 8 * 20 * 9,
        ),
        # The same with a border in place of the holes.
        ("1,8,20", "4,20,9", "4,8,9", "window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=0bf_0io->0bf", 2 * 4 * 1440),
        # Two groups of features: each output sees half of the inputs.
        ("1,4,6", "1,3,8", "1,4,8", "window={size=1}, dim_labels=b0f_0io->b0f, feature_group_count=2", 2 * 4 * 3 * 8),
        ("8,20", "20,9", "8,9", "dim_labels=bf_io->bf", 2 * 8 * 20 * 9),
    ],
)
def test_flop_of_a_convolution(image, kernel, made, attributes, flops):
    text = f"""ENTRY %main (a: f32[{image}], b: f32[{kernel}]) -> f32[{made}] {{
  %a = f32[{image}] parameter(0)
  %b = f32[{kernel}] parameter(1)
  ROOT %convolution.1 = f32[{made}] convolution(%a, %b), {attributes}, metadata={{op_name="f/conv_general_dilated"}}
}}
"""
    (row,) = cost_of(text).rows
    assert (row.flops, row.kind) == (flops, "convolution")


OTHERS = """%branch_a (p: f32[8,4]) -> f32[8,4] {
  ROOT %p = f32[8,4] parameter(0)
}

%branch_b (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4] parameter(0)
  ROOT %negate.1 = f32[8,4] negate(%p), backend_config={"estimated_cycles":"50"}
}

%async (p: f32[8,4]) -> f32[32,4] {
  %p = f32[8,4] parameter(0)
  ROOT %all-gather.1 = f32[32,4] all-gather(%p), dimensions={0}
}

ENTRY %main (a: f32[8,4], b: f32[4,6], i: s32[]) -> f32[8,6] {
  %a = f32[8,4] parameter(0)
  %b = f32[4,6] parameter(1)
  %i = s32[] parameter(2)
  %conditional.1 = f32[8,4] conditional(%i, %a, %a), branch_computations={%branch_a, %branch_b}
  %async-start.1 = ((f32[8,4]), f32[32,4]) async-start(%a), calls=%async
  %all-gather-start.1 = (f32[8,4], f32[32,4]) all-gather-start(%a), dimensions={0}
  %call.1 = f32[8,4] call(%a), to_apply=%branch_b
  %mine.1 = f32[8,4] custom-call(%a), custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"77"}}
  %yours.1 = f32[8,4] custom-call(%a), custom_call_target="tpu_custom_call"
  ROOT %dot.1 = f32[8,6] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(f)/transpose(jvp(loss))/policy/rematted_computation/attention/dot_general" source_file="/home/me/psa_jax/models/unet.py" source_line=9}
}
"""  # noqa: E501


def test_what_else_runs():
    cost = cost_of(OTHERS)
    assert cost.cycles == 50 + 50  # the dearer branch, and what is called
    assert cost.collectives == {"all-gather": (2, 2 * 32 * 4 * 4)}
    assert cost.kernel_flops == 77 and cost.unknown_kernels == ("yours.1",)
    (dot,) = [row for row in cost.rows if row.name == "dot.1"]
    assert (dot.flops, dot.useful, dot.kind, dot.phase) == (2 * 8 * 4 * 6, 0, "attention", "recomputed")
    assert (dot.scope, dot.source) == ("policy", "models/unet.py:9")


@pytest.mark.parametrize(
    ("op_name", "scopes", "phase"),
    [
        ("jit(train_step)/transpose(jvp(loss))/policy/unet/mid_block/add", ["policy", "unet", "mid_block"], "backward"),
        ("jit(train_step)/jvp(loss)/reference/unet/conv_out/add", ["reference", "unet", "conv_out"], "reference"),
        (
            "jit(train_step)/jvp(loss)/adapter/unet/contexts/vmap()/dot_general",
            ["adapter", "unet", "contexts"],
            "forward",
        ),
        ("jit(train_step)/optimizer/jit(_where)/select_n", ["optimizer"], "optimizer"),
        ("jit(_generate)/while/body/closed_call/unet/norm/mul", ["unet", "norm"], "unet"),
        ("jit(train_step)/while/body/transpose(jvp(loss/policy))/unet/mul", ["policy", "unet"], "backward"),
        ("jit(train_step)/transpose;accumulate/reshape", [], "other"),
        ("jit(train_step)/optimizer/mul;jit(train_step)/transpose(jvp(loss))/policy/add", ["optimizer"], "optimizer"),
        ("", [], "other"),
    ],
)
def test_scopes_and_phases(op_name, scopes, phase):
    assert (scope_of(op_name), phase_of(op_name)) == (scopes, phase)


def test_sizes_of_arrays():
    assert hlo.Array("bf16", (3, 5)).bytes == 30
    assert hlo.Array("pred", (7,)).bytes == 7
    assert hlo.Array("s4", (8,)).bytes == 8
    assert hlo.Array("f32", ()).bytes == 4
