"""What engines of reading do besides transformers: vLLM as a stand-in and in earnest, workers of Ray that are killed."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, SimpleNamespace
from uuid import uuid4

import pytest
from conftest import ROOT
from PIL import Image
from reading_helpers import write_pages

from minimonkey.repetition import RepetitionGuard
from minimonkey.scripts.reading.engines import Question, VllmEngine, Weights, count_page_tokens
from minimonkey.scripts.reading.reader import Reader
from minimonkey.scripts.reading.workers import LOOPBACK


EXAMPLE = ROOT / "assets" / "example.png"


# --- vLLM ------------------------------------------------------------------------------------------------------------


class FakeLlm:
    """Says what it is told, as vLLM's LLM would, and remembers how it was asked."""

    says = "Mini\nMonkey"

    def __init__(self, **options):
        FakeLlm.options, FakeLlm.asked, self.tokenizer = options, [], None

    def chat(self, messages, sampling, use_tqdm, mm_processor_kwargs):
        FakeLlm.asked.append((messages, sampling, mm_processor_kwargs))
        ids, reason = FakeLlm.tokenizer(self.says, add_special_tokens=False)["input_ids"], "stop"
        detection = getattr(sampling, "repetition_detection", None)
        if detection is not None:
            sizes, count = range(detection.min_pattern_size, detection.max_pattern_size + 1), detection.min_count

            def has_run(end: int) -> bool:
                return any(
                    end >= size * count and ids[end - size * count : end - size] == ids[end - size * (count - 1) : end]
                    for size in sizes
                )

            end = next((end for end in range(len(ids)) if has_run(end)), None)
            ids, reason = (ids, reason) if end is None else (ids[:end], "repetition")
        steps = [{token: SimpleNamespace(logprob=-0.1)} for token in ids]
        text = FakeLlm.tokenizer.decode(ids)
        output = SimpleNamespace(token_ids=ids, text=text, finish_reason=reason, logprobs=steps)
        return [SimpleNamespace(outputs=[output]) for _ in messages]


@pytest.fixture
def vllm(monkeypatch, processor):
    module, sampling = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    module.LLM, module.SamplingParams = FakeLlm, SimpleNamespace
    module.ModelRegistry = SimpleNamespace(get_supported_archs=lambda: ["MiniMonkeyForConditionalGeneration"])
    sampling.StructuredOutputsParams = sampling.RepetitionDetectionParams = SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", sampling)
    monkeypatch.setattr(FakeLlm, "says", "Mini\nMonkey")
    FakeLlm.tokenizer = processor.tokenizer
    asked = [Question("Read.", 64, {"preset": "default"}), Question("Read.", 64, {"max_tiles": 30})]
    return VllmEngine(Weights(str(ROOT), dtype="float32"), asked, kv_cache_memory_bytes=2**27)


def test_vllm_is_asked_for_all_pages_at_once_and_its_answer_is_described_as_ours(vllm):
    assert FakeLlm.options["dtype"] == "float32" and FakeLlm.options["kv_cache_memory_bytes"] == 2**27
    images = [Image.open(EXAMPLE)] * 2
    first, second = vllm.answer(images, Question("Read.", 64, {"max_tiles": 6}))
    ((messages, sampling, options),) = FakeLlm.asked
    assert len(messages) == 2 and messages[0][0]["content"][0]["image_pil"] is images[0]
    assert (sampling.temperature, sampling.max_tokens, options) == (0.0, 64, {"max_tiles": 6})
    assert first == second and (first.text, first.finish_reason) == ("Mini\nMonkey", "stop")
    assert first.confidence == pytest.approx(math.exp(-0.1))


def test_vllm_has_room_for_the_largest_page_of_all_questions(vllm):
    tokens = FakeLlm.options["max_model_len"] - 64
    assert 49 * (30 + 1) < tokens < 49 * (30 + 6 + 1) + 200
    assert FakeLlm.options["max_num_batched_tokens"] >= FakeLlm.options["max_model_len"]


def test_vllm_ends_an_answer_that_repeats_itself_where_we_do(vllm, monkeypatch, processor):
    """vLLM finds runs of 32 tokens or more, four times: a period of 20 ends it at 160, and is cut where the guard does."""
    monkeypatch.setattr(FakeLlm, "says", "the bow of the ship " * 40)
    (looped,) = vllm.answer([Image.open(EXAMPLE)], Question("Read."))
    end = RepetitionGuard(0).find(processor.tokenizer(FakeLlm.says, add_special_tokens=False)["input_ids"])
    assert looped.finish_reason == "repetition" and len(looped.token_ids) == len(looped.log_probabilities) == end
    assert len(FakeLlm.asked) == 1
    (free,) = vllm.answer([Image.open(EXAMPLE)], Question("Read.", stop_repetition=False))
    assert free.finish_reason == "stop" and free.text.count("ship") == 40


def test_what_vllm_took_for_a_loop_is_asked_again(vllm, monkeypatch):
    monkeypatch.setattr(FakeLlm, "says", "0.00 0.00 0.00\n" * 60)
    (column,) = vllm.answer([Image.open(EXAMPLE)], Question("Read."))
    assert (column.finish_reason, column.text) == ("stop", FakeLlm.says.strip())
    assert [one[1].repetition_detection.min_count for one in FakeLlm.asked] == [4, 32]


def test_vllm_holds_answers_to_a_schema_by_itself(vllm, monkeypatch):
    monkeypatch.setattr(FakeLlm, "says", '{"total": "2.38"}')
    schema = {"type": "object", "properties": {"total": {"type": "string"}}}
    reader = Reader(vllm, Question("Read.", schema=schema))
    ((line, _),) = [(reader._described(*one), one) for one in reader._ask([_page()], reader.question)]
    assert FakeLlm.asked[0][1].structured_outputs.json == schema
    assert line["fields"] == {"total": "2.38"} and line["field_confidence"]["total"] < 1


def _page():
    return SimpleNamespace(image=Image.open(EXAMPLE))


def test_scale_compression_is_asked_of_the_plugin(vllm):
    vllm.answer([Image.open(EXAMPLE)], Question("Read.", 64, {"max_tiles": 6}, scm_keep_ratio=0.25))
    assert FakeLlm.asked[0][2] == {"max_tiles": 6, "use_scm": True, "scm_keep_ratio": 0.25}
    vllm.has_scm = False
    with pytest.raises(ValueError, match="did not find this package's plugin"):
        vllm.answer([Image.open(EXAMPLE)], Question("Read.", scm_keep_ratio=0.5))


def test_what_vllm_cannot_do_is_refused(vllm):
    with pytest.raises(ValueError, match="subfolder 'weights'"):
        VllmEngine(Weights(str(ROOT), subfolder="weights"))


def test_vllm_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match="--engine vllm needs vLLM"):
        VllmEngine(Weights(str(ROOT)))


def test_tokens_are_counted_without_pixels_and_never_too_few(nano, processor):
    question = Question("Read the text.", 32, {"preset": "default"})
    for size in ((420, 240), (100, 900), (3000, 2000)):
        asked = {}

        def generate(asked=asked, **options):
            asked["tokens"] = options["input_ids"].shape[1]
            raise ValueError("enough")

        with pytest.MonkeyPatch.context() as patched, pytest.raises(ValueError, match="enough"):
            patched.setattr(nano, "generate", generate)
            nano.chat(processor, Image.new("RGB", size), question.text, images_kwargs=question.images_kwargs)
        assert 0 <= count_page_tokens(processor, *size, question) - 32 - asked["tokens"] < 128


@pytest.mark.vllm
@pytest.mark.parametrize("scm", [[], ["--use-scm", "--scm-keep-ratio", "0.5"]], ids=["whole", "scm"])
def test_vllm_reads_as_transformers_does(tmp_path, scm):
    """Run by `make test-vllm`, in an environment with vLLM; with SCM it scores as `scm_queries` of "visual" does."""
    lines, pages = {}, [str(EXAMPLE), str(ROOT / "assets" / "receipt.png")]
    model = shutil.copytree(
        ROOT, tmp_path / "model", ignore=shutil.ignore_patterns(".*", "build", "tests", "docs", "runs")
    )
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"scm_queries": "visual"}))
    for engine in ("transformers", "vllm"):
        out = tmp_path / f"{engine}.jsonl"
        command = [
            sys.executable,
            "scripts/read.py",
            *pages,
            "--model",
            str(model),
            "--engine",
            engine,
            "--out",
            str(out),
        ]
        options = ["--preset", "default", "--dtype", "float32", "--max-new-tokens", "32", *scm]
        alone = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # it starts in half the time
        subprocess.run([*command, *options], cwd=ROOT, env=alone, check=True)
        lines[engine] = list(map(json.loads, out.read_text().splitlines()))
    for ours, theirs in zip(lines["transformers"], lines["vllm"]):
        told = ("file", "page", "answer", "finish_reason", "tokens", "image_tokens")
        assert {name: theirs[name] for name in told} == {name: ours[name] for name in told}
        assert theirs["confidence"] == pytest.approx(ours["confidence"], abs=1e-3)
    assert len(lines["vllm"]) == 2


# --- Ray -------------------------------------------------------------------------------------------------------------


def workers_of(mark: str) -> list[int]:
    """The processes of Ray's workers that inherited a variable of the environment with this value."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                command, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
            except OSError:  # it has ended
                continue
            if b"MapWorker" in command and f"READING_TEST={mark}".encode() in environment:
                found.append(int(process.name))
    return found


AGENT_PORTS = ("dashboard-agent-grpc", "dashboard-agent-listen", "metrics-export", "runtime-env-agent")


@pytest.fixture
def cluster(tmp_path):
    """The environment of a program that joins a cluster of Ray on this machine, started as docs/reading.md says.

    Where other programs run too, its node daemon gives up after 15 s on helpers that choose a port themselves, and its
    workers, which are nicer than others by 15, hardly come to their turn. All of it listens on 127.0.0.1 alone,
    and has a token of its own: `ray start` asks for one where the user has one, and programs that join do not look for it.
    """
    pytest.importorskip("ray")
    with ExitStack() as sockets:
        held = [sockets.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in ("port", *AGENT_PORTS)]
        port, *ports = [one.getsockname()[1] for one in held]
    command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=4"]
    command += ["--include-dashboard=false", *(f"--{name}-port={own}" for name, own in zip(AGENT_PORTS, ports))]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid4().hex}
    environment = {**os.environ, **LOOPBACK, **token, "RAY_worker_niceness": "0", "READING_TEST": str(tmp_path)}
    with subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE) as ray:
        try:
            assert any("Ray runtime started" in line for line in ray.stdout)
            with pytest.raises(OSError):  # a listener for all addresses would answer at this one too
                socket.create_connection(("127.0.0.2", port), timeout=5).close()
            yield {**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"}
        finally:
            ray.terminate()


@pytest.mark.ray
def test_a_worker_that_is_killed_loses_no_page_and_doubles_none(tmp_path, cluster):
    """Run by `make test-ray`, in an environment with Ray."""
    path, out = write_pages(tmp_path / "scan.tif", [f"word {number}" for number in range(60)]), tmp_path / "out.jsonl"
    options = ["--max-batch-tokens", "400", "--max-new-tokens", "12", "--dtype", "float32"]
    command = [sys.executable, "scripts/read.py", str(path), *options, "--out"]
    program = subprocess.Popen([*command, str(out), "--ray", "2"], cwd=ROOT, env=cluster)
    while not out.exists() or out.read_bytes().count(b"\n") < 4:
        assert program.poll() is None
        time.sleep(0.01)
    killed = workers_of(str(tmp_path))
    os.kill(killed[0], signal.SIGKILL)
    assert out.read_bytes().count(b"\n") < 60
    assert program.wait() == 0
    lines = sorted(map(json.loads, out.read_text().splitlines()), key=lambda line: line["page"])
    assert [line["page"] for line in lines] == list(range(1, 61))
    subprocess.run([*command, str(tmp_path / "one.jsonl")], cwd=ROOT, check=True)
    one = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in lines] == [line["answer"] for line in one]


def test_ray_that_is_not_installed_is_said_before_the_work(monkeypatch):
    from minimonkey.scripts.reading.workers import check_ray

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match='pip install "ray'):
        check_ray()
