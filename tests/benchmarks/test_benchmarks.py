"""The benchmarks of scale run on tiny models, compare what they say, and never wait for a process that is gone."""

import importlib
import json
import multiprocessing
import threading
from pathlib import Path

import new_process
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure


pytestmark = pytest.mark.process
SENTENCES = ["good film", "bad book", "good good book film bad book", "film", "bad bad film book good film", "book"]


@pytest.fixture(autouse=True)
def threads():
    """Leave the number of threads to the other tests as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def queue(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("moebert_queue")


@pytest.fixture
def scale(queue):
    return importlib.import_module("moebert_scale")


@pytest.fixture
def queue_arguments(queue, tiny_teacher, tmp_path):
    """Two slices of three batches."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": text}) for text in 2 * SENTENCES))
    return queue.QueueArguments(
        texts=[str(texts)],
        tokenizer=str(tiny_teacher),
        slices=2,
        batch_size=2,
        settings=["1x1", "2x1"],
        precisions=["float32"],
        tiny=True,
        output=tmp_path / "output",
    )


def start_thread(serve):
    """Serve in a thread, which starts sooner than a process."""

    def start(*args):
        ours, theirs = multiprocessing.Pipe()
        threading.Thread(target=serve, args=(theirs, *args), daemon=True).start()
        return ours

    return start


def test_queue_compares_every_model_order_padding_and_setting(queue, queue_arguments, monkeypatch, capsys):
    monkeypatch.setattr(queue, "start", start_thread(queue.serve))
    queue.main(queue_arguments)
    found = json.loads((queue_arguments.output / "queue.json").read_text())
    keys = [tuple(point[key] for key in ("model", "order", "padding", "setting")) for point in found["points"]]
    names = ["dense, plain", "dense, float32", "moebert, float32"]
    assert set(keys) == {(name, *way, s) for name in names for way in queue.ways(name) for s in ("1x1", "2x1")}
    for key, point in zip(keys, found["points"], strict=True):
        plain = found["points"][keys.index(("dense, plain", "as they come", "padded", key[-1]))]["seconds"]
        first = found["points"][keys.index((*key[:-1], "1x1"))]["seconds"]
        for over, seconds in (("over_plain", plain), ("over_first_setting", first)):
            assert point[over]["median"] == pytest.approx(np.median(np.divide(seconds, point["seconds"])))
    assert found["padding"]["length-sorted"] < found["padding"]["as they come"]
    assert found["memory_mb"].keys() == set(names)
    assert (queue_arguments.output / "queue.png").stat().st_size > 0
    assert capsys.readouterr().out.count("| moebert, float32; length-sorted, padding skipped | ") == 2


def test_queue_runs_in_a_process_whose_end_is_noticed(queue, queue_arguments, monkeypatch):
    new_process.start_server()
    context = multiprocessing.get_context("forkserver")  # starts sooner than the one of the benchmark
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
    part = queue.read_queue(queue_arguments)
    connection = queue.start("dense, plain", queue_arguments, part)
    assert connection.recv() == "ready"
    call = queue.in_turns([connection], 1, ("length-sorted", "padded"))
    for _ in part:
        call()
    connection.send(None)
    assert connection.recv() > 0
    with pytest.raises((EOFError, BrokenPipeError, ConnectionResetError)):
        call()


def test_processes_share_a_slice(queue):
    ours, theirs = zip(*(multiprocessing.Pipe() for _ in range(2)), strict=True)
    for connection in theirs:
        connection.send("done")
    queue.in_turns(list(ours), 1, ("as they come", "padded"))()
    batches = list(range(5))
    parts = [batches[part::parts] for *_, part, parts in (connection.recv() for connection in theirs)]
    assert parts == [[0, 2, 4], [1, 3]]


@pytest.mark.parametrize("name", ["dense, float32", "moebert, float32"])
def test_the_batch_says_whether_padding_is_skipped(queue, queue_arguments, name):
    slices = queue.read_queue(queue_arguments)
    model, batches = queue.build(name, tiny=True), queue.make_slices(name, slices, 2)
    entered = []
    model.encoder.register_forward_pre_hook(lambda _, args: entered.append(args[0].shape[:2]))
    _, mask = list(queue.cut_batches(slices[0], "as they come", 2))[1]
    with torch.no_grad():
        padded, skipped = (
            model(**batches["as they come", padding, 0][1]).last_hidden_state for padding in queue.PADDINGS
        )
    assert not mask.all()
    assert entered == [mask.shape, (1, mask.sum())]
    torch.testing.assert_close(padded[mask], skipped[mask], rtol=1e-4, atol=1e-5)


def test_queue_refuses_what_it_cannot_run(queue, queue_arguments):
    with pytest.raises(ValueError, match=r"`settings` must be processes x threads, such as 2x1, got \['2'\]"):
        queue.QueueArguments(texts=["a"], tokenizer="b", settings=["1x1", "2"])
    with pytest.raises(ValueError, match="`precision` must be one of .*, got 'int4'"):
        queue.QueueArguments(texts=["a"], tokenizer="b", precisions=["int4"])
    queue_arguments.slices = 13
    with pytest.raises(ValueError, match="`texts` must hold a sentence for each of 13 slices, got 12"):
        queue.read_queue(queue_arguments)
    queue_arguments.text_column = "sentence"
    with pytest.raises(
        ValueError, match="`text_column` must be in every object, 'sentence' is not in {'text': 'good f"
    ):
        queue.read_queue(queue_arguments)


def test_growth_compares_with_the_smallest_and_with_the_plain_model(scale, tmp_path, capsys):
    sizes = {"batches": [1, 2], "lengths": [4, 8], "experts": [1, 2, 16]}
    scale.main(scale.ScaleArguments(**sizes, precisions=["float32"], rounds=2, tiny=True, output=tmp_path))
    found = json.loads((tmp_path / "growth_cpu.json").read_text())["results"]
    assert [sorted({point["size"] for point in points}) for points in found.values()] == list(sizes.values())
    for points in found.values():
        seconds = {(point["model"], point["size"]): np.array(point["seconds"]) for point in points}
        smallest = min(size for _, size in seconds)
        for point in points:
            mine = seconds[point["model"], point["size"]]
            plain = "speed_up" in point
            base = seconds["dense, plain" if plain else point["model"], smallest]
            assert point["cost"]["median"] == pytest.approx(np.median(mine / base))
            if plain:
                over = np.median(seconds["dense, plain", point["size"]] / mine)
                assert point["speed_up"]["median"] == pytest.approx(over)
    assert len(list(tmp_path.glob("growth_cpu_*.png"))) == 3
    assert "| float32, 8x64 | 1.00 (1.00 to 1.00) | " in capsys.readouterr().out


def growth_point(model, size, cost):
    return {"model": model, "size": size, "cost": {"median": cost, "low": cost / 2, "high": 2 * cost}}


@pytest.mark.parametrize(("most", "yscale"), [(2.0, "linear"), (20.0, "log")])
def test_growth_shows_a_line_for_each_model(scale, monkeypatch, most, yscale):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    points = [growth_point("a", 4, most), growth_point("b", 1, 1.5), growth_point("a", 1, 1.0)]
    scale.plot_growth(points, "growth.png", value="cost", xlabel="size", ylabel="cost")
    axes = figures[0].axes[0]
    assert {line.get_label(): line.get_xydata().tolist() for line in axes.lines} == {
        "a": [[1, 1.0], [4, most]],
        "b": [[1, 1.5]],
    }
    band = axes.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (0.5, 2 * most)
    assert axes.get_yscale() == yscale


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_growth_on_a_gpu_is_skipped_without_one(scale, tmp_path, capsys):
    scale.main(scale.ScaleArguments(device="cuda", output=tmp_path))
    assert "Skipped: torch sees no CUDA device." in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="`device` must be cpu or cuda, got 'tpu'"):
        scale.ScaleArguments(device="tpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_growth_on_a_gpu(scale, tmp_path):
    scale.main(scale.ScaleArguments(device="cuda", gpu_batches=[2, 4], rounds=2, tiny=True, output=tmp_path))
    (points,) = json.loads((tmp_path / "growth_cuda.json").read_text())["results"].values()
    assert {(point["model"], point["size"]) for point in points} == {(n, b) for n in scale.GPU_MODELS for b in (2, 4)}


def test_stacks_are_compared_with_their_rivals(queue, monkeypatch, tmp_path, capsys):
    stacks = importlib.import_module("moebert_inference")
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1024")
    output = tmp_path / "stacks.json"
    chosen = {"cases": ["1x32", "2xreal"], "precisions": ["float32"], "threads": [1], "rounds": 2, "onnx": False}
    stacks.main(stacks.InferenceArguments(**chosen, batches=2, smoke=True, output=output))
    random, real = json.loads(output.read_text())["results"]
    assert random["tokens"] == [32, 32]
    assert real["tokens"][0] < real["tokens"][1]  # some of it is padding
    timed = {f"{kind} {stack}" for kind in stacks.FORMS for stack in ("stock", "float32")}
    assert random["seconds"].keys() == timed | {"moebert float32 padded"}
    assert max(random["differences"].values()) < 1e-4
    assert [row["against"] for row in random["targets"]] == ["dense float32"]
    assert "| moebert float32 | dense float32 |" in capsys.readouterr().out


def test_sentences_of_the_texts_given_are_timed(queue, tiny_teacher, tmp_path):
    stacks = importlib.import_module("moebert_inference")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": text}) for text in SENTENCES))
    args = stacks.InferenceArguments(texts=texts, tokenizer=str(tiny_teacher), batches=2)
    batches = stacks.make_batches("3xreal", args)
    assert all(batch.keys() == {"input_ids", "attention_mask"} for batch in batches)  # as of random ids
    lengths = sorted(int(length) for batch in batches for length in batch["attention_mask"].sum(dim=1))
    assert lengths == sorted(len(text.split()) + 2 for text in SENTENCES)
    with pytest.raises(ValueError, match="`texts` and `tokenizer` must be given together"):
        stacks.InferenceArguments(texts=texts)


def test_matrix_product_operators_are_timed_case_by_case(queue, tmp_path, capsys):
    mpo, output = importlib.import_module("mpo"), tmp_path / "mpo.json"
    tiny = {"rounds": 2, "step_rounds": 2, "layers": 1, "batch": 2, "seq": 8, "smoke": True}
    mpo.main(mpo.MPOBenchmarkArguments(**tiny, output=output))
    found = json.loads(output.read_text())["results"]
    assert list(found) == list(mpo.CASES)
    assert [row["layer"] for row in found["evaluation"]] == 2 * ["48 to 96"] + 2 * ["96 to 48"]
    assert {row["bonds"] for row in found["rebuild"]} == {"full", 128, 64, 32}
    for row in found["chain"]:  # a target stands where the layer picked the chain: such small ones never do
        assert row["target"] is None
    assert {row["matrices"] for row in found["compression"]} == {12 * 6 + 2}
    assert "\nrebuild, cpu clock, " in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"`cases` must be among \['evaluation', .*\], got \['speed'\]"):
        mpo.MPOBenchmarkArguments(cases=["speed"])


def test_rebuilding_is_compared_with_the_same_matrix(queue):
    mpo = importlib.import_module("mpo")
    for num_cores in (3, 5):
        cores = mpo.random_cores(48, 96, num_cores, 4)
        assert max(core.shape[-1] for core in cores) == 4
        torch.testing.assert_close(mpo.left_to_right(cores), mpo.contract(cores))


MASKS_ARE_TINY = {"layers": 1, "rounds": 2, "decode_rounds": 2, "train_seq": 8, "batch": 2, "seq": 8, "smoke": True}


def test_masks_are_timed_against_dense_models_and_what_they_promise(queue, tmp_path, capsys):
    masks, output = importlib.import_module("masks"), tmp_path / "masks.json"
    masks.main(masks.MaskBenchmarkArguments(**MASKS_ARE_TINY, dtypes=["float32"], output=output))
    found = json.loads(output.read_text())["results"]
    assert [row["model"] for row in found["training"]] == ["1 expert", "4 experts"]
    names = ["half width", *(f"4 experts, {way}" for way in masks.IMPLEMENTATIONS), "1 expert"]
    for case in ("prefill", "decode"):
        rows = {row["model"]: row for row in found[case]}
        assert list(rows) == names
        promised = {name: row["promised"] for name, row in rows.items()}
        assert promised["1 expert"] == promised["half width"] > promised["4 experts, eager"] > 1.2  # without a router
        assert promised["4 experts, eager"] == promised["4 experts, grouped_mm"]
        assert rows["1 expert"]["share of it"] == pytest.approx(
            rows["1 expert"]["over dense"]["median"] / promised["1 expert"], abs=1e-2
        )
    assert "\ndecode, 1 thread(s), cpu clock\n" in capsys.readouterr().out


def test_checkpoints_are_timed_instead_of_drawn_masks(queue, tmp_path):
    masks = importlib.import_module("masks")
    args = masks.MaskBenchmarkArguments(**MASKS_ARE_TINY, dtypes=["bfloat16"])
    models = masks.make_models(args, torch.float32)
    for name in ("dense", "4 experts, eager"):
        models[name].save_pretrained(tmp_path / name)
    args.dense, args.model = tmp_path / "dense", tmp_path / "4 experts, eager"
    rows = masks.CASES["prefill"](args)
    assert [row["model"] for row in rows] == ["half width", *(f"compact, {way}" for way in masks.IMPLEMENTATIONS)]
    with pytest.raises(ValueError, match="`model` and `dense` must be given together"):
        masks.MaskBenchmarkArguments(dense=tmp_path)
    with pytest.raises(ValueError, match=r"`specific` must be in \[0, 1\], got 2"):
        masks.MaskBenchmarkArguments(specific=2)
    with pytest.raises(ValueError, match=r"`cases` must be among \['training', .*\], got \['speed'\]"):
        masks.MaskBenchmarkArguments(cases=["speed"])


@pytest.mark.parametrize("experts", [1, 3, 4])
@pytest.mark.parametrize("specific", [0.0, 0.25, 0.5])
def test_drawn_masks_open_half_of_the_units(queue, experts, specific):
    drawn = importlib.import_module("masks").draw_masks((2, experts, 120), specific, seed=0)
    open_of_all, open_of_some = drawn.all(dim=1), drawn.any(dim=1)
    assert drawn.sum(dim=(1, 2)).tolist() == [60 * experts] * 2
    share = specific if experts > 1 else 0.0
    assert (open_of_some & ~open_of_all).sum(dim=1).tolist() == [round(share * 120)] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_masks_are_timed_on_a_gpu(queue, tmp_path):
    masks, output = importlib.import_module("masks"), tmp_path / "masks.json"
    masks.main(masks.MaskBenchmarkArguments(**MASKS_ARE_TINY, dtypes=["bfloat16"], device="cuda", output=output))
    assert list(json.loads(output.read_text())["results"]) == list(masks.CASES)


@pytest.fixture
def gpu(queue):
    return importlib.import_module("gpu")


def test_what_a_gpu_shows_is_tried_on_the_cpu(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(gpu.GpuArguments(steps=3, rounds=2, smoke=True)) == 0
    table = capsys.readouterr().out
    parity = [line for line in table.splitlines() if line.startswith("| parity")]
    assert len(parity) == 8
    assert all("equal: " in line for line in parity)
    for row in ("| Trainer, bf16 | MoEBERT | finite: 3 steps |", "| Trainer, bf16 | PLATON | finite: 3 steps |"):
        assert row in table
    for part in ("| pruner | PLATON over none | a step takes", "| 2:4 | csr over dense |", "| experts |"):
        assert part in table


def test_without_a_device_nothing_is_tried(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(gpu.GpuArguments()) == 0
    assert "Skipped: needs a CUDA device and torch 2.11" in capsys.readouterr().out


def test_a_wrong_result_ends_with_an_error(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "find_device", lambda args: "cpu")
    dense = torch.nn.Linear(2, 2)
    wrong = iter([[torch.ones(2)] * 2, [torch.zeros(2)] * 2])
    monkeypatch.setattr(gpu, "make_forms", lambda args: {"dense": (dense, {})})
    monkeypatch.setattr(gpu, "run_both_ways", lambda model, batch: next(wrong))
    for part in ("train", "time_pruner", "time_sparse", "grow"):
        monkeypatch.setattr(gpu, part, lambda args, device: [])
    assert gpu.main(gpu.GpuArguments(smoke=True)) == 1
