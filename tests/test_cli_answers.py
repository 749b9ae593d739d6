"""`plphp run --data`: a file of prompts in batches, and compiled steps, as they are typed."""

import json
import shutil
from pathlib import Path

import pytest

from plphp_cli.answering import AnswersRecord
from plphp_cli.cli.app import main
from plphp_cli.compiled import StepCompiler
from plphp_cli.results import from_json
from plphp_cli.serialize import parse


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("prompts")
    lines = []
    for number, (colour, question) in enumerate(
        [
            ("red", "what is it?"),
            ("blue", "describe the image."),
            ("green", "how many?"),
            ("red", "what is it?"),
        ]
    ):
        Image.new("RGB", (40 + 10 * number, 40), colour).save(folder / f"{number}.png")
        lines.append({"images": [f"{number}.png"], "prompt": question, "answer": "nothing"})
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def answers(capsys, prompts, toy, *words):
    command = ["run", "--model", toy, "--device", "cpu", "--data", prompts, "--max-new-tokens", "8"]
    assert main([*command, *words]) == 0
    printed = capsys.readouterr()
    return [json.loads(line) for line in printed.out.splitlines()], printed.err


def test_batches_answer_as_one_by_one_in_the_order_of_the_file(capsys, prompts, toy, tmp_path):
    alone, _ = answers(capsys, prompts, toy)
    target = tmp_path / "record.json"
    together, notes = answers(capsys, prompts, toy, "--batch-size", "3", "--json", str(target))
    assert [answer["line"] for answer in together] == [1, 2, 3, 4]
    assert together == alone
    assert "4 answers in batches of 3" in notes
    assert "0 of 4 answers are the expected ones" in notes
    record = parse(AnswersRecord, target.read_text(encoding="utf-8"))
    assert [answer.text for answer in record.answers] == [answer["text"] for answer in together]
    assert all(0 < answer.kv_bytes_held < answer.kv_bytes_full for answer in record.answers)
    assert record.compiled is None


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_steps_answer_the_same_and_say_what_compiling_took(capsys, prompts, toy, tmp_path):
    plain, _ = answers(capsys, prompts, toy, "--batch-size", "2")
    target = tmp_path / "record.json"
    compiled, notes = answers(capsys, prompts, toy, "--batch-size", "2", "--compile", "--json", str(target))
    assert compiled == plain
    assert "hit rate" in notes
    assert parse(AnswersRecord, target.read_text(encoding="utf-8")).compiled.refused is None


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_one_prompt_compiled_has_both_arms_and_a_note(capsys, prompts, toy, tmp_path, monkeypatch):
    step_for, capacities = StepCompiler.step_for, []

    def noted(compiler, cache, positions, **options):
        capacities.append([layer.rows[0].buffers[0].shape[2] for layer in cache.layers])
        return step_for(compiler, cache, positions, **options)

    monkeypatch.setattr(StepCompiler, "step_for", noted)
    target = tmp_path / "record.json"
    image = prompts.replace("prompts.jsonl", "0.png")
    command = ["run", "--model", toy, "--device", "cpu", "--image", image, "--prompt", "what?"]
    assert main([*command, "--max-new-tokens", "8", "--compile", "--json", str(target)]) == 0
    assert "note: compiled steps: 1 capture for 4 batches" in capsys.readouterr().err
    record = from_json(target.read_text(encoding="utf-8"))
    # Warmed up by caches of the capacities that are timed, so that no arm compiles while it is.
    assert capacities[:2] == capacities[2:]
    assert capacities[0] != capacities[1]
    assert any("compiled steps: 1 capture for 4 batches, hit rate 75.0 %" in note for note in record.notes)
    assert record.pruned.new_tokens == record.unpruned.new_tokens == 8
    assert main([*command, "--max-new-tokens", "8", "--json", "-"]) == 0
    plain = from_json(capsys.readouterr().out)
    assert plain.pruned.token_ids == record.pruned.token_ids


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--batch-size", "2", "--image", "x.png", "--prompt", "y"], "--data"),
        (["--batch-size", "0", "--data", "x.jsonl"], "batch-size"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data", "nowhere.jsonl", "--chat"], "--chat"),
        (["--data", "nowhere.jsonl", "--recut", "each-turn"], "--recut"),
        (["--data", "nowhere.jsonl", "--raw-prompt"], "--raw-prompt"),
        (["--data", "nowhere.jsonl", "--system", " "], "the system message is blank"),
    ],
)
def test_bad_input_is_one_line(words, named, capsys):
    assert main(["run", *words]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert "Traceback" not in error


def test_what_a_file_of_prompts_has_not_anyway_may_be_left_out_by_name(capsys, prompts, toy):
    asked = [json.loads(Path(prompts).read_text(encoding="utf-8").splitlines()[0])["prompt"]]
    found, _ = answers(capsys, prompts, toy, "--no-baseline", "--no-live", "--seed", "3")
    assert [answer["prompt"] for answer in found][:1] == asked


def test_what_was_prefilled_before_a_prompt_that_fails_is_answered(capsys, prompts, toy):
    whole, _ = answers(capsys, prompts, toy)
    lines = Path(prompts).read_text(encoding="utf-8").splitlines()
    bad = json.dumps({**json.loads(lines[2]), "prompt": "<image> and <image>?"})
    target = Path(prompts).with_name("bad.jsonl")
    target.write_text("\n".join([*lines[:2], bad, lines[3]]) + "\n", encoding="utf-8")
    words = ["--data", str(target), "--max-new-tokens", "8", "--batch-size", "4"]
    assert main(["run", "--model", toy, "--device", "cpu", *words]) != 0
    printed = capsys.readouterr()
    assert [json.loads(line) for line in printed.out.splitlines()] == whole[:2]
    assert "\nerror: " in printed.err


def test_a_rate_is_of_sixteen_steps_or_unknown(capsys, prompts, toy, tmp_path):
    def record(tokens):
        target = tmp_path / f"{tokens}.json"
        words = [
            "--data",
            prompts,
            "--batch-size",
            "4",
            "--max-new-tokens",
            str(tokens),
            "--json",
            str(target),
        ]
        assert main(["run", "--model", toy, "--device", "cpu", *words]) == 0
        capsys.readouterr()
        return parse(AnswersRecord, target.read_text(encoding="utf-8"))

    few, many = record(8), record(40)
    assert few.decode_tokens_per_s is None
    assert max(answer.new_tokens for answer in many.answers) > 16
    later = sum(answer.new_tokens - 1 for answer in many.answers)
    assert many.decode_tokens_per_s == pytest.approx(later / many.decode_s)
