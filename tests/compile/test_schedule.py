"""What is read from a scheduled program: loops, collectives in every notation, memory that is touched."""

import pytest

from omni.compile.estimate import between_slices
from omni.compile.schedule import Program

PROGRAM = """HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}, execution_thread="sparsecore"

%take (stack: bf16[32,64,128], index: s32[]) -> bf16[64,128] {
  %stack = bf16[32,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %index = s32[] parameter(1)
  ROOT %slice = bf16[1,64,128]{2,1,0} dynamic-slice(%stack, %index), dynamic_slice_sizes={1,64,128}
}

%gathered (x: bf16[64,128]) -> bf16[256,128] {
  %x = bf16[64,128]{1,0} parameter(0)
  ROOT %gather = bf16[256,128]{1,0} all-gather(%x), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
}

%condition (state: (s32[], bf16[32,64,128])) -> pred[] {
  %state = (s32[], bf16[32,64,128]{2,1,0}) parameter(0)
  %count = s32[] get-tuple-element(%state), index=0
  %last = s32[]{:T(128)} constant(32)
  ROOT %less = pred[] compare(%count, %last), direction=LT
}

%body (state: (s32[], bf16[32,64,128])) -> (s32[], bf16[32,64,128]) {
  %state = (s32[], bf16[32,64,128]{2,1,0}) parameter(0)
  %count = s32[] get-tuple-element(%state), index=0
  %stack = bf16[32,64,128]{2,1,0} get-tuple-element(%state), index=1
  %layer = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} fusion(%stack, %count), kind=kLoop, calls=%take
  %start = ((bf16[64,128]{1,0}), bf16[256,128]{1,0}, u32[]) async-start(%layer), calls=%gathered
  %product = f32[256,256]{1,0} convolution(%layer, %layer), dim_labels=bf_oi->bf
  %done = bf16[256,128]{1,0} async-done(%start)
  %reduced = (f32[256,256]{1,0}, f32[8]{0}) all-reduce(%product, %bias), replica_groups=mesh['a'=2,'b'=4] {'b'}, on={
}}
  ROOT %next = (s32[], bf16[32,64,128]{2,1,0}) tuple(%count, %stack)
}

ENTRY %main (stack: bf16[32,64,128]) -> f32[] {
  %stack = bf16[32,64,128]{2,1,0} parameter(0)
  %zero = s32[] constant(0)
  %state = (s32[], bf16[32,64,128]{2,1,0}) tuple(%zero, %stack)
  %loop = (s32[], bf16[32,64,128]{2,1,0}) while(%state), condition=%condition, body=%body
  %part = f32[16]{0} reduce-scatter(%whole), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
  %whole = f32[64]{0} copy(%part)
  %moved = bf16[64,128]{1,0} collective-permute(%stack), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  ROOT %end = f32[] copy(%zero)
}
"""


@pytest.fixture(scope="module")
def program():
    return Program(PROGRAM, 8)


def test_loops(program):
    """A body runs as often as its counter counts, though a kernel's description has lines that look like an end."""
    assert [(each.name, times) for each, times in program.scheduled()] == [("main", 1), ("body", 32)]
    assert program.computations["body"].instructions[-1].name == "next"


def test_collectives(program):
    """Kinds, bytes that a device sends, groups and what is hidden, in all notations."""
    found = {each.kind: each for each in program.collectives()}
    assert found["all-gather"].bytes == 32 * 256 * 128 * 2 * 3 / 4
    assert found["all-gather"].groups == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert found["all-gather"].hidden and not found["all-reduce"].hidden
    assert found["all-reduce"].bytes == 32 * (256 * 256 + 8) * 4 * 2 * 3 / 4
    assert found["all-reduce"].groups == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert found["reduce-scatter"].bytes == 64 * 4 * 3 / 4
    assert found["reduce-scatter"].groups == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert found["collective-permute"].bytes == 64 * 128 * 2


def test_memory_of_a_slice(program):
    """A fusion that takes a layer from a stack touches the layer; what lies on chip does not count."""
    body = program.computations["body"]
    layer = 64 * 128 * 2
    assert program._touched(body, body["layer"]) == layer + 4
    assert program._touched(body, body["product"]) == 256 * 256 * 4


def test_memory_of_a_start(program):
    """Operands and results stand side by side in the shape of what begins: each is touched once, on chip none."""
    text = PROGRAM.replace(
        "  ROOT %end = f32[] copy(%zero)",
        "  %fetch = (f32[16]{0:T(128)S(1)}, f32[16]{0}, u32[]{:S(2)}) copy-start(%part)\n"
        "  ROOT %end = f32[] copy(%zero)",
    )
    changed = Program(text, 8)
    assert changed.memory_bytes() - program.memory_bytes() == 16 * 4 + 4


def test_memory_of_an_update():
    """What is scattered into a cache where it lies is what is touched, in a fusion and alone."""
    scatter = "scatter(%cache, %places, %new), update_window_dims={1}"
    text = f"""
%written (cache: bf16[4096,128], places: s32[8,1], new: bf16[8,128]) -> bf16[4096,128] {{
  %cache = bf16[4096,128]{{1,0}} parameter(0)
  %places = s32[8,1]{{1,0}} parameter(1)
  %new = bf16[8,128]{{1,0}} parameter(2)
  ROOT %scattered = bf16[4096,128]{{1,0}} {scatter}
}}

ENTRY %main (cache: bf16[4096,128], places: s32[8,1], new: bf16[8,128]) -> bf16[4096,128] {{
  %cache = bf16[4096,128]{{1,0}} parameter(0)
  %places = s32[8,1]{{1,0}} parameter(1)
  %new = bf16[8,128]{{1,0}} parameter(2)
  %fused = bf16[4096,128]{{1,0}} fusion(%cache, %places, %new), kind=kCustom, calls=%written
  ROOT %alone = bf16[4096,128]{{1,0}} {scatter}
}}
"""
    program = Program(text, 1)
    main = program.computations["main"]
    new = 8 * 128 * 2
    assert program._touched(main, main["alone"]) == 2 * new
    assert program._touched(main, main["fused"]) == 2 * new + 8 * 4


STEPS = """
%begin (shard: bf16[64,128]) -> (bf16[64,128], bf16[256,128], u32[]) {
  %shard = bf16[64,128]{1,0} parameter(0)
  %gather.1 = bf16[256,128]{1,0} all-gather(%shard), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %begun = (bf16[64,128]{1,0}, bf16[256,128]{1,0}, u32[]{:S(2)}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%layer (stack: f32[32,16,16], number: s32[]) -> f32[16,16] {
  %stack = f32[32,16,16]{2,1,0} parameter(0)
  %number = s32[] parameter(1)
  %slice = f32[1,16,16]{2,1,0} dynamic-slice(%stack, %number), dynamic_slice_sizes={1,16,16}
  ROOT %flat = f32[16,16]{1,0} bitcast(%slice)
}

%step (x: f32[16,16], stack: f32[32,16,16], number: s32[], shard: bf16[64,128], whole: bf16[256,128]) -> (f32[16,16], f32[32,16,16], bf16[64,128], bf16[256,128]) {
  %x = f32[16,16]{1,0} parameter(0)
  %stack = f32[32,16,16]{2,1,0} parameter(1)
  %number = s32[] parameter(2)
  %shard = bf16[64,128]{1,0} parameter(3)
  %whole = bf16[256,128]{1,0} parameter(4)
  %taken = f32[16,16]{1,0} fusion(%stack, %number), kind=kLoop, calls=%layer
  %product = f32[16,16]{1,0} convolution(%x, %taken), dim_labels=bf_io->bf
  %one = f32[1,16,16]{2,1,0} bitcast(%product)
  %kept = f32[32,16,16]{2,1,0} dynamic-update-slice(%stack, %one, %number)
  %gather.2 = bf16[256,128]{1,0} all-gather(%shard), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %all = (f32[16,16]{1,0}, f32[32,16,16]{2,1,0}, bf16[64,128]{1,0}, bf16[256,128]{1,0}) tuple(%product, %kept, %shard, %gather.2)
}

%end (whole: bf16[256,128], shard: bf16[64,128]) -> bf16[256,128] {
  %whole = bf16[256,128]{1,0} parameter(0)
  %shard = bf16[64,128]{1,0} parameter(1)
  %gather.3 = bf16[256,128]{1,0} all-gather(%shard), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %ended = bf16[256,128]{1,0} custom-call(%gather.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (shard: bf16[64,128], x: f32[16,16], stack: f32[32,16,16], number: s32[]) -> bf16[256,128] {
  %shard = bf16[64,128]{1,0} parameter(0)
  %x = f32[16,16]{1,0} parameter(1)
  %stack = f32[32,16,16]{2,1,0} parameter(2)
  %number = s32[] parameter(3)
  %started = (bf16[64,128]{1,0}, bf16[256,128]{1,0}, u32[]{:S(2)}) fusion(%shard), kind=kCustom, calls=%begin
  %whole = bf16[256,128]{1,0} get-tuple-element(%started), index=1
  %worked = (f32[16,16]{1,0}, f32[32,16,16]{2,1,0}, bf16[64,128]{1,0}, bf16[256,128]{1,0}) fusion(%x, %stack, %number, %shard, %whole), kind=kOutput, calls=%step
  %further = bf16[256,128]{1,0} get-tuple-element(%worked), index=3
  ROOT %done = bf16[256,128]{1,0} fusion(%further, %shard), kind=kCustom, calls=%end
}
"""  # noqa: E501


def test_a_gather_taken_in_steps():
    """It is sent once, beside the work of the fusions that take its steps; without one, it is waited for."""
    (gather,) = Program(STEPS, 4).collectives()
    assert (gather.kind, gather.bytes, gather.hidden) == ("all-gather", 256 * 128 * 2 * 3 / 4, True)
    lines = [line for line in STEPS.splitlines() if "%worked" not in line]
    (alone,) = Program("\n".join(lines).replace("fusion(%further", "fusion(%whole"), 4).collectives()
    assert alone.bytes == gather.bytes and not alone.hidden


def test_memory_of_what_is_handed_on():
    """A stack of which one layer is read and another written, within a fusion of a fusion: two layers, with what is
    multiplied and the product. What is gathered counts once."""
    program = Program(STEPS, 4)
    main, layer = program.computations["main"], 16 * 16 * 4
    assert program._touched(main, main["worked"]) == 4 * layer + 4
    assert program.memory_bytes() == 4 * layer + 4 + 256 * 128 * 2


BETWEEN_SLICES = """HloModule step, is_scheduled=true

ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  %after = token[] after-all()
  %sent = (f32[8,128]{1,0}, u32[], token[]) send(%x, %after), channel_id=2, is_host_transfer=true, ATTRIBUTES
  %come = (RESULT{1,0}, u32[], token[]) recv(%after), channel_id=1, is_host_transfer=true, ATTRIBUTES
  %beside = f32[8,128]{1,0} fusion(%x), kind=kLoop, calls=%beside_it
  %arrived = (RESULT{1,0}, token[]) recv-done(%come), channel_id=1, is_host_transfer=true
  %gone = token[] send-done(%sent), channel_id=2, is_host_transfer=true
  ROOT %end = RESULT{1,0} get-tuple-element(%arrived), index=0
}
"""


@pytest.mark.parametrize(
    ("kind", "named", "target", "result", "slices", "share"),
    [
        ("all-reduce", "ALL_REDUCE", '"{1,2}x{0:3}"', "f32[8,128]", 2, 1),
        ("all-reduce", "ALL_REDUCE", '"{1,2,3,4}x{0:3}"', "f32[8,128]", 4, 1.5),
        ("all-gather", "ALL_GATHER", '"{1,2,3,4}x{0:3}"', "f32[32,128]", 4, 3),
        ("reduce-scatter", "REDUCE_SCATTER", '"{1,2}x{0:3}"', "f32[4,128]", 2, 0.5),
        ("all-to-all", "ALL_TO_ALL", "{{100000,200000},{100001,200001}}", "f32[8,128]", 2, 0.5),
        ("collective-permute", "ONE_TO_ONE", "{{100000->200000},{200000->100000}}", "f32[8,128]", 2, 1),
    ],
)
def test_what_hosts_exchange(kind, named, target, result, slices, share):
    """Between slices hosts send, for each device to its counterparts, so many times what it hands over, in all of
    libtpu's notations; it is hidden where computation stands before what comes back is awaited."""
    attributes = (
        f'frontend_attributes={{_xla_host_transfer_rendezvous="a_0",_xla_megascale_target={target},'
        f'_xla_megascale_transfer_type="{named}"}}'
    )
    text = BETWEEN_SLICES.replace("ATTRIBUTES", attributes).replace("RESULT", result)
    (found,) = Program(
        text.replace("fusion(%x), kind=kLoop, calls=%beside_it", "add(%x, %x)"), 4 * slices
    ).collectives()
    assert (found.kind, found.bytes) == (kind, share * 8 * 128 * 4) and not found.hidden
    assert found.groups == [[first + 4 * each for each in range(slices)] for first in range(4)]
    assert between_slices(found.groups[0], [each for each in range(slices) for _ in range(4)]) == 1
    (found,) = Program(
        text.replace("fusion(%x), kind=kLoop, calls=%beside_it", "dot(%x, %x)"), 4 * slices
    ).collectives()
    assert found.hidden


def test_a_turn_of_the_loop(program):
    """What is outside of the loop does not count, what is inside counts once."""
    turn = program.loop()
    assert [(each.name, times) for each, times in turn.scheduled()] == [("body", 1)]
    whole = {each.kind: each.bytes for each in program.collectives()}
    assert {each.kind: 32 * each.bytes for each in turn.collectives()} == {
        kind: whole[kind] for kind in ("all-gather", "all-reduce")
    }


def test_between_slices():
    """Of a ring within a slice nothing leaves it; of two slices' devices, each sends its share."""
    slices = [0] * 4 + [1] * 4
    assert between_slices([0, 1, 2, 3], slices) == 0
    assert between_slices([0, 4], slices) == 1
    assert between_slices(range(8), slices) == 1 / 7
