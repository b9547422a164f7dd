"""The planner: recorded machines x real models, and what has to hold for any of them."""

import contextlib
import json
from collections import Counter
from dataclasses import replace
from math import log2
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plan as command
from planner import choose, memory, render
from planner.choose import DoesNotFitError, Plan, Wish
from planner.config import load_model, read_model
from planner.machine import GIB, Gpu, Link, Machine, load_machine
from planner.memory import Settings
from planner.model import Cached, Model
from stack.console import Problem

TESTS = Path(__file__).resolve().parents[1]
MACHINES = {path.stem: load_machine(path) for path in sorted((TESTS / "machines").glob("*.json"))}
MODELS = {
    path.parent.name: read_model(json.loads(path.read_text()), path.parent.name)
    for path in sorted((TESTS / "models").glob("*/config.json"))
    if path.parent.name != "mamba-2.8b"
}
GOALS: tuple[choose.Goal, ...] = ("throughput", "latency")


def check(machine: Machine, plan: Plan) -> None:
    """What holds for every plan."""
    used = Counter(gpu.index for one in plan.replicas for gpu in one.gpus)
    assert all(count == 1 for count in used.values()), "a GPU is in two replicas"
    assert set(used) | {gpu.index for gpu, _ in plan.idle} == {gpu.index for gpu in machine.gpus}
    model = plan.model
    for one in plan.replicas:
        assert len({gpu.size for gpu in one.gpus}) <= 1, "two kinds of GPU in one replica"
        assert model.attention.heads % one.tp == 0
        kv = model.attention.kv_heads
        assert not kv or kv % one.tp == 0 or one.tp % kv == 0
        assert one.account.max_requests >= (1.05 if machine.gpus else 1), "no room for a request of full length"
        if model.whole_prompts and machine.gpus:
            assert one.settings.max_batched_tokens >= plan.max_length, "its prompts are not cut into pieces"
        assert (model.pooling and model.pooling.encoder) or one.account.kv_tokens >= plan.max_length, (
            "KV cache for less than one request"
        )
        if machine.gpus:
            assert len(one.gpus) == one.tp * one.pp
            for gpu in one.gpus:
                assert one.account.used <= gpu.free, "more memory than is free"
        else:
            assert one.account.used <= one.account.total
    if not machine.gpus:
        assert sum(one.account.total for one in plan.replicas) <= machine.memory_free


@pytest.mark.parametrize("goal", ["throughput", "latency"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("machine", MACHINES)
def test_every_machine_with_every_model_gets_a_sound_plan_or_a_way_out(
    machine: str, model: str, goal: choose.Goal
) -> None:
    try:
        plan = choose.choose(MACHINES[machine], MODELS[model], Wish(goal=goal))
    except DoesNotFitError as error:
        what, fix = error.what, error.fix
        assert fix
        assert "GiB" in what, "says by how much"
    else:
        check(MACHINES[machine], plan)


# ---- models: parameters as their makers state them, in billions


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        ("SmolLM2-135M-Instruct", 0.1345, None),
        ("DeepSeek-R1-Distill-Qwen-1.5B", 1.777, None),
        ("Llama-3.1-8B-Instruct", 8.030, None),
        ("Mistral-7B-v0.1", 7.242, None),
        ("Qwen2.5-7B-Instruct-AWQ", 7.616, None),
        ("Qwen2.5-32B-Instruct", 32.76, None),
        ("Llama-3.3-70B-Instruct", 70.55, None),
        ("gemma-3-27b-it", 27.0, None),
        ("gpt-oss-20b", 20.9, 3.6),
        ("Qwen3-30B-A3B", 30.5, 3.3),
        ("Mixtral-8x7B-Instruct-v0.1", 46.7, 12.9),
        ("DeepSeek-V3", 671.0, 37.0),
        ("bge-m3", 0.568, None),
        ("gemma-4-E4B-it", 8.0, None),
        ("gemma-4-31B-it", 31.0, None),
        ("Nemotron-Super-49B", 49.9, None),
    ],
)
def test_parameters_are_counted_as_published(name: str, billions: float, active: float | None) -> None:
    found = MODELS[name].all_parameters if "gemma-4" in name else MODELS[name].parameters
    assert found / 1e9 == pytest.approx(billions, rel=0.02)
    if active:
        assert MODELS[name].active_parameters / 1e9 == pytest.approx(active, rel=0.1)


@pytest.mark.parametrize(
    ("name", "tp", "bytes_"),
    [
        ("Llama-3.1-8B-Instruct", 1, 131072),  # 32 layers x 2 x 8 heads x 128 x 2 bytes
        ("Llama-3.1-8B-Instruct", 2, 65536),
        ("Llama-3.1-8B-Instruct", 16, 16384),  # 8 KV heads on 16 GPUs: each keeps one
        ("DeepSeek-V3", 1, 70272),  # 61 layers x (512 + 64) x 2 bytes, whatever tp
        ("DeepSeek-V3", 8, 70272),
        ("bge-m3", 1, 0),
    ],
)
def test_kv_bytes_of_a_token(name: str, tp: int, bytes_: int) -> None:
    assert memory.kv_bytes_per_token(MODELS[name], tp, MODELS[name].layers) == bytes_


def test_a_sliding_window_keeps_little_of_a_long_request() -> None:
    gemma = MODELS["gemma-3-27b-it"]
    assert (gemma.attention.window, gemma.attention.sliding_layers) == (1024, 52)
    settings = Settings(256, 2048)
    everything = memory.request_bytes(
        replace(gemma, attention=replace(gemma.attention, cached=(Cached(62, 16, 128),))), 1, 62, 131072, settings
    )
    assert memory.request_bytes(gemma, 1, 62, 131072, settings) < everything / 5
    assert MODELS["Qwen2.5-32B-Instruct"].attention.sliding_layers == 0, "use_sliding_window is false there"


@pytest.mark.parametrize(
    ("name", "length", "pp", "blocks", "layers"),
    [
        # 52 layers with a window and 10 without: 6 groups of 10 that keep 1023 tokens and two steps, and one of 10
        ("gemma-3-27b-it", 32768, 1, 6 * (320 + 1) + 2048, 10),
        ("gemma-3-27b-it", 4096, 1, 6 * (256 + 1) + 256, 10),
        ("gemma-3-27b-it", 32768, 2, 6 * (448 + 1) + 2048, 5),  # three steps, half of each group on a stage
        ("gpt-oss-20b", 32768, 1, (264 + 1) + 2048, 12),
        ("Mistral-7B-v0.1", 32768, 1, 512 + 1, 32),  # every layer has a window
        ("Llama-3.1-8B-Instruct", 32768, 1, 2048, 32),
    ],
)
def test_layers_with_a_window_are_kept_in_groups_of_one_size(
    name: str, length: int, pp: int, blocks: int, layers: int
) -> None:
    """As vLLM 0.32 groups and pads them."""
    model = MODELS[name]
    token = 2 * model.attention.kv_heads * model.attention.head_dim * 2
    kept = memory.request_bytes(model, 1, model.layers // pp, length, Settings(256, 2048), pp)
    assert kept == blocks * layers * 16 * token


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        ("Qwen2.5-7B-Instruct-AWQ", 5.2),
        ("gpt-oss-20b", 13.65),
        ("DeepSeek-V3", 641.0),
        ("Llama-3.1-8B-Instruct", 14.96),
    ],
)
def test_weights_of_quantized_checkpoints(name: str, gib: float) -> None:
    assert memory.total_weight_bytes(MODELS[name]) / GIB == pytest.approx(gib, rel=0.05)


def test_a_recurrent_model_is_refused_in_one_line() -> None:
    with pytest.raises(Problem, match="recurrent state"):
        load_model(str(TESTS / "models" / "mamba-2.8b"), TESTS)


@pytest.mark.parametrize("config", [{}, {"hidden_size": 0}, {"text_config": []}, {"hidden_size": "big"}])
def test_a_config_that_is_no_language_model_is_refused_in_one_line(config: dict[str, object]) -> None:
    with pytest.raises(Problem):
        read_model({"architectures": ["X"], **config} if config else {}, "x")


LLAMA = json.loads((TESTS / "models" / "Llama-3.1-8B-Instruct" / "config.json").read_text())
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10**6) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
READ = ["rope_scaling", "quantization_config", "layer_types", "architectures", "max_position_embeddings", "num_experts"]
READ += ["linear_attn_config", "hybrid_override_pattern", "block_configs", "compress_ratios", "intermediate_size"]
READ += ["hidden_size_per_layer_input", "num_kv_shared_layers", "mlp_layer_types", "audio_config", "vision_config"]
READ += ["sliding_window", "sliding_window_pattern", "mlp_only_layers", "kv_lora_rank", "torch_dtype", "text_config"]


@settings(max_examples=300)
@given(changed=st.dictionaries(st.sampled_from([*LLAMA, *READ]), JSON, min_size=1, max_size=3) | JSON)
def test_any_config_is_a_model_or_one_line(changed: Any) -> None:
    with contextlib.suppress(Problem):
        read_model(LLAMA | changed if isinstance(changed, dict) else changed, "x")


def test_layers_go_to_stages_as_in_vllm() -> None:
    assert memory.stage_layers(32, 2) == [16, 16]
    assert memory.stage_layers(61, 4) == [15, 15, 16, 15]
    assert memory.stage_layers(64, 3) == [21, 22, 21]


# ---- measured on real GPUs


# On two H200 with vLLM 0.26, at 16,384 tokens: KV tokens, and GiB in use on the fullest GPU. The account's constants
# were fitted on the first two models.
REPORTED = [
    ("DeepSeek-R1-Distill-Qwen-1.5B", 1, 1, 4659040, 130.49),
    ("DeepSeek-R1-Distill-Qwen-1.5B", 2, 1, 9441248, 132.64),
    ("DeepSeek-R1-Distill-Qwen-1.5B", 1, 2, 9457536, 132.45),
    ("Llama-3.1-8B-Instruct", 1, 1, 920144, 130.42),
    ("Llama-3.1-8B-Instruct", 2, 1, 1971776, 132.86),
    ("Llama-3.1-8B-Instruct", 1, 2, 1965456, 132.35),
    ("Qwen2.5-32B-Instruct", 1, 1, 269296, 130.34),
    ("Qwen2.5-32B-Instruct", 2, 1, 794448, 134.12),
    ("Qwen2.5-32B-Instruct", 1, 2, 789888, 132.33),
]


@pytest.mark.parametrize(("name", "tp", "pp", "kv_tokens", "used"), REPORTED)
def test_the_account_is_within_five_percent_of_what_vllm_reported(
    name: str, tp: int, pp: int, kv_tokens: int, used: float
) -> None:
    gpu = load_machine(TESTS / "machines" / "two-h200.json").gpus[0]
    account = memory.account(MODELS[name], gpu, tp, pp, 16384, Settings.default(gpu))
    assert account.kv_tokens == pytest.approx(kv_tokens, rel=0.05)
    assert account.used / GIB == pytest.approx(used, rel=0.05)


def test_cuda_graphs_are_taken_off_before_the_kv_cache_on_a_small_gpu() -> None:
    """vLLM 0.32 measures them for every model and hands out what is left: on a small GPU they are a good part of it."""
    model, gpu, settings = MODELS["Llama-3.1-8B-Instruct"], MACHINES["one-24gb"].gpus[0], Settings(256, 2048)
    account = memory.account(model, gpu, 1, 1, 4096, settings)
    assert account.graphs / GIB == pytest.approx(0.7, rel=0.05)
    asked = account.utilization * gpu.total
    assert account.kv == pytest.approx(asked - account.weights - account.activations - account.graphs - account.other)
    assert account.used <= gpu.free
    bare = memory.account(model, gpu, 1, 1, 4096, replace(settings, eager=True))
    assert bare.kv - account.kv == account.graphs + account.activations - bare.activations


@pytest.mark.parametrize(
    ("model", "sizes"), [("Llama-3.1-8B-Instruct", (256, 2048)), ("Qwen2.5-32B-Instruct", (64, 1024))]
)
def test_a_model_that_nearly_fills_its_gpu_gets_few_graphs_and_short_steps(model: str, sizes: tuple[int, int]) -> None:
    """A 32B in 4 bits leaves some 1.5 GiB of 24: CUDA graphs of 256 requests would take most of that."""
    plan = choose.choose(MACHINES["one-24gb"], MODELS[model], Wish())
    settings = plan.replicas[0].settings
    assert (settings.max_num_seqs, settings.max_batched_tokens) == sizes
    assert plan.max_length >= 4096


@pytest.mark.parametrize("machine", ["one-24gb", "four-3090", "home-lab"])
@pytest.mark.parametrize("context", [None, 16384])
def test_a_length_that_memory_sets_leaves_room_for_an_error(machine: str, context: int | None) -> None:
    """vLLM refuses to start with a KV cache of less than one request, and predictions err."""
    plan = choose.choose(MACHINES[machine], MODELS["Llama-3.1-8B-Instruct"], Wish(context=context))
    assert all(one.account.max_requests >= 1.05 for one in plan.replicas)
    only = MACHINES[machine].model_copy(update={"gpus": MACHINES[machine].gpus[-1:]})
    one = choose.choose(only, MODELS["Llama-3.1-8B-Instruct"], Wish(context=context)).replicas[0]
    assert one.account.max_requests >= 1.05
    if not context:
        assert one.longest < 131072, "memory sets it, not the model"


# ---- machines


def layout(machine: str, model: str, wish: Wish = Wish()) -> str:  # noqa: B008 - frozen
    return choose.choose(MACHINES[machine], MODELS[model], wish).layout


def test_two_h200_are_planned_by_goal() -> None:
    assert layout("two-h200", "Llama-3.1-8B-Instruct") == "2 × tp 1"
    assert layout("two-h200", "Llama-3.1-8B-Instruct", Wish(goal="latency")) == "1 × tp 2"
    assert layout("two-h200", "Llama-3.3-70B-Instruct") == "1 × tp 2"


def test_a_replica_stays_within_one_numa_node_where_it_can() -> None:
    plan = choose.choose(MACHINES["four-3090"], MODELS["Llama-3.1-8B-Instruct"], Wish(tp=2))
    assert [{gpu.numa for gpu in one.gpus} for one in plan.replicas] == [{0}, {1}]


def test_unequal_replicas_get_unequal_weights() -> None:
    plan = choose.choose(MACHINES["home-lab"], MODELS["DeepSeek-R1-Distill-Qwen-1.5B"], Wish())
    assert [one.gpus[0].name for one in plan.replicas].count("NVIDIA GeForce RTX 3090") == 3
    weights = {one.gpus[0].name: one.weight for one in plan.replicas}
    assert weights["NVIDIA GeForce RTX 3090"] > 2 * weights["NVIDIA GeForce RTX 3060"]


def test_the_small_card_is_left_out_of_what_it_cannot_hold() -> None:
    plan = choose.choose(MACHINES["home-lab"], MODELS["Llama-3.1-8B-Instruct"], Wish())
    assert [gpu.name for gpu, _ in plan.idle] == ["NVIDIA GeForce RTX 3060"]
    assert "too few" in plan.idle[0][1]


def test_a_mig_slice_is_named_by_its_uuid_and_works_alone() -> None:
    plan = choose.choose(MACHINES["mig"], MODELS["DeepSeek-R1-Distill-Qwen-1.5B"], Wish())
    assert all(one.tp * one.pp == 1 and one.gpus[0].id.startswith("MIG-") for one in plan.replicas)


def test_other_programs_keep_their_memory() -> None:
    plan = choose.choose(MACHINES["busy"], MODELS["DeepSeek-R1-Distill-Qwen-1.5B"], Wish())
    shares = {one.gpus[0].index: one.account.utilization for one in plan.replicas}
    assert shares[0] < 0.4 < 0.9 <= shares[1]
    with pytest.raises(DoesNotFitError, match=r"makes it fit is stop python3 \(pid 48213\) on GPU 0"):
        choose.choose(MACHINES["busy"], MODELS["Mixtral-8x7B-Instruct-v0.1"], Wish())


def test_a_model_too_large_is_quantized_with_the_reason() -> None:
    plan = choose.choose(MACHINES["home-lab"], MODELS["Llama-3.3-70B-Instruct"], Wish())
    assert plan.quantization == "bitsandbytes"
    assert "131.4 GiB of 16-bit weights" in plan.reasons[0]
    with pytest.raises(DoesNotFitError, match="leave out --quantization none"):
        choose.choose(MACHINES["home-lab"], MODELS["Llama-3.3-70B-Instruct"], Wish(quantization="none"))


def test_what_would_make_it_fit_is_the_smallest_change() -> None:
    one = MACHINES["one-24gb"]
    with pytest.raises(DoesNotFitError, match="makes it fit is --context 32768"):
        choose.choose(one, MODELS["Llama-3.1-8B-Instruct"], Wish(context=131072, quantization="none"))
    with pytest.raises(DoesNotFitError, match="makes it fit is 2 × NVIDIA GeForce RTX 3090 instead of 1"):
        choose.choose(one, MODELS["Mixtral-8x7B-Instruct-v0.1"], Wish())
    with pytest.raises(DoesNotFitError, match="--replicas 4"):
        choose.choose(MACHINES["four-3090"], MODELS["SmolLM2-135M-Instruct"], Wish(replicas=5))


def test_a_laptop_without_a_gpu_gets_replicas_on_the_cpu() -> None:
    plan = choose.choose(MACHINES["laptop"], MODELS["SmolLM2-135M-Instruct"], Wish())
    assert plan.layout == "2 × tp 1"
    assert choose.choose(MACHINES["laptop"], MODELS["SmolLM2-135M-Instruct"], Wish(tp=3)).replicas[0].tp == 3
    with pytest.raises(Problem, match="take --tp of 1, 3"):
        choose.choose(MACHINES["laptop"], MODELS["SmolLM2-135M-Instruct"], Wish(tp=2))


@pytest.mark.parametrize(
    ("machine", "model", "wish", "words"),
    [
        ("two-h200", "SmolLM2-135M-Instruct", Wish(context=9000), "takes 8192 tokens at most"),
        ("two-h200", "SmolLM2-135M-Instruct", Wish(tp=2), "9 heads: take --tp of 1, 3"),
        ("four-3090", "Llama-3.1-8B-Instruct", Wish(tp=8), "--tp 8 needs 8 GPUs of one kind, there are 4"),
        ("one-24gb", "Llama-3.1-8B-Instruct", Wish(tp=2), "--tp 2 needs 2 GPUs of one kind, there are 1"),
        ("one-24gb", "Llama-3.1-8B-Instruct", Wish(pp=2), "--pp 2 needs 2 GPUs of one kind, there are 1"),
        ("home-lab", "Llama-3.1-8B-Instruct", Wish(tp=2, pp=2), "--tp 2 --pp 2 needs 4 GPUs of one kind, there are 3"),
        ("eight-h100", "Llama-3.1-8B-Instruct", Wish(pp=33), "needs 33 GPUs|has 32 layers"),
        ("mig", "Llama-3.1-8B-Instruct", Wish(tp=2), "--tp 2: a MIG slice works alone"),
        ("two-h200", "bge-m3", Wish(pp=2), "--pp 2: bge-m3 is an embedding model"),
        ("laptop", "bge-m3", Wish(pp=2), "does not work on a CPU"),
        ("laptop", "SmolLM2-135M-Instruct", Wish(replicas=30), "take --replicas [2-9]"),
        (
            "laptop",
            "SmolLM2-135M-Instruct",
            Wish(quantization="bitsandbytes"),
            "--quantization bitsandbytes: there is no GPU",
        ),
        ("laptop", "SmolLM2-135M-Instruct", Wish(kv_cache="fp8"), "--kv-cache fp8: there is no GPU"),
    ],
)
def test_impossible_wishes_are_one_line(machine: str, model: str, wish: Wish, words: str) -> None:
    with pytest.raises(Problem, match=words):
        choose.choose(MACHINES[machine], MODELS[model], wish)


def test_a_gpu_that_is_not_there_is_told_by_the_option_that_named_it() -> None:
    with pytest.raises(Problem, match="--gpus: there is no GPU 7 here"):
        MACHINES["two-h200"].only([0, 7])
    with pytest.raises(Problem, match="--also: there is no GPU 7 here"):
        MACHINES["two-h200"].only([7], "--also")


def test_workers_on_a_cpu_share_the_kv_cache() -> None:
    """vLLM takes KV_CACHE_GB for each of them."""
    host = MACHINES["laptop"].model_copy(update={"memory_free": 100 * GIB, "cpu_cores": 32})
    model = MODELS["Llama-3.1-8B-Instruct"]
    plans = [choose.choose(host, model, Wish(tp=tp, replicas=1, context=65536)) for tp in (1, 2, 4)]
    caches = [plan.replicas[0].tp * plan.replicas[0].account.kv for plan in plans]
    assert caches[0] == caches[1] == caches[2] == 8 * GIB
    for plan in plans:
        check(host, plan)
        one = plan.replicas[0]
        assert one.account.total >= one.account.weights + one.tp * one.account.kv


def test_an_embedding_model_gets_its_longest_prompt_into_one_step() -> None:
    """vLLM does not cut its prompts into pieces, and refuses to start with less."""
    for machine in MACHINES.values():
        if machine.gpus:
            plan = choose.choose(machine, MODELS["bge-m3"], Wish())
            assert all(one.settings.max_batched_tokens >= plan.max_length for one in plan.replicas)


def test_route_weights_are_small_whole_numbers_in_proportion() -> None:
    assert choose.route_weights([500.0, 500.0]) == [1, 1]
    assert choose.route_weights([500.0, 1300.0, 1300.0]) == [5, 13, 13]


# ---- properties

KINDS = [
    ("RTX 3060", 12, (8, 6), 360.0, 25.5),
    ("RTX 3090", 24, (8, 6), 936.0, 71.0),
    ("H100", 79, (9, 0), 3352.0, 989.0),
]
EVERY_LINK: list[tuple[str, float]] = [("nvlink", 450.0), ("phb", 15.8), ("node", 15.8), ("sys", 7.9)]


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    gpus = []
    for index in range(draw(st.integers(1, 6))):
        name, gib, capability, bandwidth, tflops = draw(st.sampled_from(KINDS))
        used = draw(st.integers(0, gib - 2)) if draw(st.booleans()) else 0
        gpus.append(
            Gpu(
                index=index,
                id=str(index),
                name=name,
                total=gib * GIB,
                free=(gib - used) * GIB,
                compute_capability=capability,
                bandwidth_gb_s=bandwidth,
                bf16_tflops=tflops,
            )
        )
    links = []
    for a in range(len(gpus)):
        for b in range(a + 1, len(gpus)):
            kind, gb_s = draw(st.sampled_from(EVERY_LINK))
            links.append(Link.model_validate({"a": a, "b": b, "kind": kind, "gb_s": gb_s}))
    return Machine(
        name="any", cpu_cores=16, memory=128 * GIB, memory_free=100 * GIB, gpus=tuple(gpus), links=tuple(links)
    )


QUANTIZED = [
    {"quant_method": "fp8", "weight_block_size": [128, 128]},
    {"quant_method": "awq", "bits": 4, "group_size": 128},
    {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["model.layers.0.self_attn.q_proj"]},
    {"quant_method": "mxfp4"},
]


@st.composite
def experts(draw: st.DrawFn) -> dict[str, Any]:
    count = draw(st.sampled_from([8, 16, 64]))
    return {
        "num_local_experts": count,
        "num_experts_per_tok": draw(st.integers(1, count)),
        "moe_intermediate_size": 64 * draw(st.integers(2, 45)),
        "n_shared_experts": draw(st.integers(0, 2)),
        "first_k_dense_replace": draw(st.integers(0, 3)),
    }


@st.composite
def latent(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "kv_lora_rank": draw(st.sampled_from([256, 512])),
        "q_lora_rank": draw(st.sampled_from([None, 768])),
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    }


@st.composite
def windows(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "sliding_window": draw(st.sampled_from([128, 1024, 4096])),
        "sliding_window_pattern": draw(st.sampled_from([None, 2, 4, 6])),
    }


@st.composite
def states(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "model_type": "qwen3_next",
        "full_attention_interval": draw(st.integers(2, 4)),
        "linear_num_key_heads": draw(st.sampled_from([4, 16])),
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": draw(st.sampled_from([64, 128])),
    }


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "sliding_window": 512,
        "sliding_window_pattern": draw(st.sampled_from([2, 6])),
        "global_head_dim": 256,
        "num_global_key_value_heads": draw(st.sampled_from([None, 1])),
        "num_kv_shared_layers": draw(st.integers(0, 3)),
        "hidden_size_per_layer_input": draw(st.sampled_from([None, 256])),
    }


POOLED = st.sampled_from(["XLMRobertaModel", "LlamaBidirectionalModel", "MistralModel", "Qwen2ForProcessRewardModel"])
TOWER = st.just({"vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}})


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Dense models, and those with each of what vLLM counts otherwise, alone and together."""
    head_dim = draw(st.sampled_from([64, 128]))
    kv = draw(st.integers(1, 12))
    heads = kv * draw(st.integers(1, 8))
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": heads * head_dim,
        "intermediate_size": 64 * draw(st.integers(8, 500)),
        "num_hidden_layers": draw(st.integers(4, 80)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": head_dim,
        "vocab_size": draw(st.integers(1000, 200_000)),
        "max_position_embeddings": draw(st.sampled_from([2048, 8192, 32768, 131072])),
        "tie_word_embeddings": draw(st.booleans()),
    }
    for kind in draw(
        st.lists(st.sampled_from([experts(), latent(), windows(), TOWER, states(), shapes()]), max_size=2)
    ):
        config |= draw(kind)
    if draw(st.integers(0, 3)) == 0:
        config["quantization_config"] = draw(st.sampled_from(QUANTIZED))
    elif draw(st.integers(0, 3)) == 0:
        config["architectures"] = [draw(POOLED)]
    return read_model(config, "any", trust=True)  # some together are no model that there is


WISHES = st.builds(
    Wish,
    goal=st.sampled_from(["throughput", "latency"]),
    quantization=st.sampled_from([None, None, "none", "bitsandbytes"]),
    replicas=st.sampled_from([None, None, 1, 2]),
)


@settings(max_examples=600)
@given(machine=machines(), model=models(), wish=WISHES)
def test_any_plan_is_sound(machine: Machine, model: Model, wish: Wish) -> None:
    plan = choose.best(machine, model, wish)
    if plan:
        check(machine, plan)
        if wish.replicas:
            assert len(plan.replicas) == wish.replicas


def larger(machine: Machine, gib: int) -> Machine:
    """The same host with so many GiB more on each GPU."""
    more = [
        gpu.model_copy(update={"total": gpu.total + gib * GIB, "free": gpu.free + gib * GIB}) for gpu in machine.gpus
    ]
    return machine.model_copy(update={"gpus": tuple(more)})


def figure(plan: Plan) -> float:
    """What its goal asks for."""
    return plan.tokens_per_s if plan.wish.goal == "throughput" else 1 / plan.latency


def no_worse(before: Plan, after: Plan) -> None:
    """As docs/plan.md says when a plan is worse than another."""
    assert weights(after) <= weights(before)
    if weights(after) == weights(before):
        assert after.worth >= before.worth * (1 - 1e-9)
        made_up = log2(after.max_length / before.max_length * max(1.0, after.tokens_per_s / before.tokens_per_s))
        # and 1.1 for longer steps: eight times as long at most
        assert figure(after) * 1.1 ** (made_up + 1) >= figure(before)


def weights(plan: Plan) -> int:
    """The place of its weights in the order that docs/plan.md gives."""
    order = ("fp8", "bitsandbytes")
    offloads = any(one.settings.offload for one in plan.replicas)
    return 3 if offloads else order.index(plan.quantization) + 1 if plan.quantization else 0


@settings(max_examples=600)
@given(machine=machines(), model=models(), wish=WISHES, more=st.integers(1, 64))
def test_more_memory_never_gives_a_worse_plan(machine: Machine, model: Model, wish: Wish, more: int) -> None:
    if before := choose.best(machine, model, wish):
        after = choose.best(larger(machine, more), model, wish)
        assert after
        no_worse(before, after)


def test_a_context_that_is_asked_for_fits_or_there_is_no_plan() -> None:
    """Sizes of a GPU around the one where it just fits."""
    wish, gpu, found = Wish(context=32768, quantization="none"), MACHINES["one-24gb"].gpus[0], []
    for tenth in range(180, 260):
        only = gpu.model_copy(update={"total": tenth * GIB // 10, "free": tenth * GIB // 10})
        machine = MACHINES["one-24gb"].model_copy(update={"gpus": (only,)})
        plan = choose.best(machine, MODELS["Llama-3.1-8B-Instruct"], wish)
        if plan and not plan.replicas[0].settings.offload:
            assert plan.kv_tokens >= 32768
        found.append(plan is not None)
    assert found == sorted(found), "more memory holds what less held"
    assert len(set(found)) == 2


@pytest.mark.parametrize("goal", ["throughput", "latency"])
@pytest.mark.parametrize(
    ("model", "sizes"), [("Llama-3.1-8B-Instruct", range(14, 32)), ("Qwen2.5-32B-Instruct", range(60, 84))]
)
@pytest.mark.parametrize("quantization", [None, "none"])
def test_each_gib_more_gives_no_worse_a_plan(
    goal: choose.Goal, model: str, sizes: range, quantization: str | None
) -> None:
    wish, gpu, before = Wish(goal=goal, quantization=quantization), MACHINES["one-24gb"].gpus[0], None
    for gib in sizes:
        only = gpu.model_copy(update={"total": gib * GIB, "free": gib * GIB})
        plan = choose.best(MACHINES["one-24gb"].model_copy(update={"gpus": (only,)}), MODELS[model], wish)
        if before:
            assert plan
            no_worse(before, plan)
        before = plan


def test_two_percent_are_not_worth_a_sixth_of_the_context() -> None:
    plan = choose.choose(MACHINES["home-lab"], MODELS["Qwen2.5-32B-Instruct"], Wish())
    assert (plan.layout, plan.max_length) == ("1 × tp 1 × pp 3", 32768)


@pytest.mark.parametrize("machine", ["two-h200", "eight-h100", "four-3090", "one-24gb", "busy", "mig"])
@pytest.mark.parametrize("goal", GOALS)
def test_a_model_that_fits_is_not_quantized(machine: str, goal: choose.Goal) -> None:
    plan = choose.choose(MACHINES[machine], MODELS["Llama-3.1-8B-Instruct"], Wish(goal=goal))
    assert plan.quantization is None


def test_what_fewer_bits_would_give_is_a_runner_up() -> None:
    gpu = MACHINES["one-24gb"].gpus[0].model_copy(update={"total": 19 * GIB, "free": 19 * GIB})
    machine = MACHINES["one-24gb"].model_copy(update={"gpus": (gpu,)})
    plan = choose.choose(machine, MODELS["Llama-3.1-8B-Instruct"], Wish())
    assert plan.quantization is None
    (other,) = (one for one in plan.runners_up if one.quantization == "bitsandbytes")
    assert other.max_length > 8 * plan.max_length


def test_each_kind_of_gpu_has_its_own_sizes() -> None:
    h100, small = MACHINES["eight-h100"].gpus[0], MACHINES["one-24gb"].gpus[0]
    for first, second in ((h100, small), (small, h100)):
        gpus = (first.model_copy(update={"index": 0, "id": "0"}), second.model_copy(update={"index": 1, "id": "1"}))
        host = MACHINES["one-24gb"].model_copy(update={"gpus": gpus})
        plan = choose.choose(host, MODELS["DeepSeek-R1-Distill-Qwen-1.5B"], Wish())
        sizes = {one.gpus[0].name: one.settings.max_num_seqs for one in plan.replicas}
        assert sizes == {h100.name: 1024, small.name: 256}
        assert {one for what, _, _ in render.reasons(plan) if (one := what.partition(" of replica ")[2])} == {"0", "1"}


FURTHER = ["bge-m3", "SmolLM2-135M-Instruct", "DeepSeek-R1-Distill-Qwen-1.5B", "Llama-3.1-8B-Instruct"]


@st.composite
def further(draw: st.DrawFn) -> str:
    path = str(TESTS / "models" / draw(st.sampled_from(FURTHER)))
    pins = draw(st.lists(st.integers(0, 3), max_size=2, unique=True))
    return f"{path}@{','.join(map(str, pins))}" if pins else path


HOSTS = machines() | st.integers(2, 64).map(
    lambda gib: Machine(name="none", cpu_cores=8, memory=64 * GIB, memory_free=gib * GIB)
)


@settings(max_examples=100)
@given(machine=HOSTS, also=st.lists(further(), max_size=3), gpus=st.none() | st.just([0]), wish=WISHES)
def test_no_gpu_and_no_memory_is_given_to_two_models(
    machine: Machine, also: list[str], gpus: list[int] | None, wish: Wish
) -> None:
    try:
        parts = command.plan_all(machine, str(TESTS / "models" / "SmolLM2-135M-Instruct"), also, gpus, wish)
    except Problem:
        return
    assert len(parts) == 1 + len(also)
    used = Counter(gpu.index for part in parts for one in part.plan.replicas for gpu in one.gpus)
    assert all(count == 1 for count in used.values())
    assert sum(part.plan.host_memory for part in parts) <= machine.memory_free
    for part in parts:
        for one in part.plan.replicas:
            assert one.account.max_requests >= 1
            assert all(one.account.used <= gpu.free for gpu in one.gpus)


@settings(max_examples=600)
@given(model=models(), tp=st.sampled_from([1, 2, 4, 8]), pp=st.sampled_from([1, 2, 4]))
def test_no_weight_is_lost_over_the_gpus(model: Model, tp: int, pp: int) -> None:
    if tp not in model.tp_sizes(8) or pp > model.layers:
        return
    spread = sum(memory.weight_bytes(model, tp, pp, stage) * tp for stage in range(pp))
    assert spread >= memory.total_weight_bytes(model) - 2 * tp * pp
