"""Which stage a kernel of a profile belongs to (`bench kernels`)."""

from powertrain.bench.kernels import Problem, stage_floors, stages_of

HERE = "void powertrain::(anonymous namespace)::"
SM90 = "void powertrain::sm90::"
PACK = HERE + "pack_inputs<__nv_bfloat16, 32>(powertrain::(anonymous namespace)::PackArguments<T1>)"
PACK_GRAD = HERE + "pack_grad<__nv_bfloat16, 32, false>(powertrain::Strided<T1>, powertrain::Strided<T1>, bool)"
DQ = SM90 + "chunk_scan_grad_kernel<32, __nv_bfloat16, false>(powertrain::sm90::ScanGradParams)"
KEY_GRADS = SM90 + "key_grads_kernel<__nv_bfloat16>(powertrain::sm90::KeyGradsParams)"
ENTER = HERE + "enter_kernel(float *, const float *, const float *, float *, long, long, long, int, bool)"
GATES = [HERE + "state_flow<__nv_bfloat16, 32>(const T1 *, const T1 *)", HERE + "gate_grad(GateGradArguments)"]
OTHERS = (
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1ul>>(int)"
)


def segments(packs: int) -> str:
    return f"{SM90}segment_state_kernel<__nv_bfloat16, (powertrain::sm90::Packs){packs}>(SegmentStateParams<T1>)"


def query_scan(packs: int) -> str:
    return f"{SM90}query_scan_kernel<__nv_bfloat16, (powertrain::sm90::Packs){packs}>(QueryScanParams<T1>)"


def test_stages_of_head_dim_32_that_pack_on_the_way() -> None:
    forward = [PACK, segments(4), ENTER, query_scan(3)]
    backward = [OTHERS, segments(2), ENTER, KEY_GRADS, DQ, *GATES]
    reverse = "pack_grad, segment_state reverse"
    assert stages_of(forward + backward) == [
        *("gates", "pack k, v, segment_state", "pack k, v, segment_state", "pack q, query_scan"),
        *(None, reverse, reverse, "key_grads", "chunk_scan_grad", "state_flow", "gate_grad"),
    ]


def test_stages_of_head_dim_32_with_one_segment() -> None:
    kernels = [PACK, query_scan(1), PACK_GRAD, KEY_GRADS, DQ]
    assert stages_of(kernels) == ["gates", "pack, query_scan", "pack_grad", "key_grads", "chunk_scan_grad"]


def test_stages_of_head_dim_32_packed_before() -> None:
    kernels = [PACK, segments(0), ENTER, query_scan(0), PACK_GRAD, segments(0), ENTER, KEY_GRADS, DQ]
    assert stages_of(kernels) == [
        *("pack", "segment_state", "segment_state", "query_scan", "pack_grad"),
        *("segment_state reverse", "segment_state reverse", "key_grads", "chunk_scan_grad"),
    ]


def test_stages_of_the_other_head_dims() -> None:
    state = SM90 + "chunk_state_kernel<64, __nv_bfloat16>(powertrain::sm90::ChunkStateParams)"
    join = HERE + "join_kernel<__nv_bfloat16, 64, false>(powertrain::(anonymous namespace)::JoinParams)"
    scan = SM90 + "chunk_scan_kernel<64, __nv_bfloat16, {}>(powertrain::sm90::ScanParams)"
    kernels = [PACK, state, join, scan.format("false"), PACK_GRAD, state, join, DQ, scan.format("true"), DQ]
    assert stages_of(kernels) == [
        *(
            "pack",
            "chunk_state",
            "chunk_state",
            "chunk_scan",
            "pack_grad",
            "chunk_state reverse",
            "chunk_state reverse",
        ),
        *("chunk_scan_grad", "chunk_scan reverse", "chunk_scan_grad reverse"),
    ]


def test_every_stage_has_a_floor() -> None:
    problem = Problem("K=32", 1, 65536, 8, 8, 32)
    floors = stage_floors(problem, {"matrix_tflops": 731.0, "copy_tbps": 3.0})
    kernels = [PACK, segments(4), query_scan(3), segments(2), KEY_GRADS, DQ, GATES[0], query_scan(1)]
    assert all(floors[stage] > 0 for stage in stages_of(kernels) if stage)
    # k and v are read and written once, as by pt_pack, two of whose three tensors they are here.
    assert floors["pack k, v, segment_state"] >= 0.99 * floors["pack"] * 2 / 3
