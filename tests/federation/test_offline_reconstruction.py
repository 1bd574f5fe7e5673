"""`fedllm-sec reconstruct`: from adapter folders to words, JSON and a page."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from fedllm_sec import InputError
from fedllm_sec.cli import app
from fedllm_sec.federation.offline_reconstruction import Told, reconstruct_adapter
from tests.attacks.reconstruction.clients import VOCABULARY, lora_client, tiny_base


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    """A client of a tiny Llama whose tokens are called w0, w1, ..., with the global adapter and a file of texts."""
    folder = tmp_path_factory.mktemp("sent")
    base = tiny_base("llama", folder / "base")
    vocabulary = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(base)
    texts = [[7, 1900, 12, 77, 8], [500, 7, 33, 9]]
    made = lora_client(folder, base, texts, kind="llama", r=2)
    (folder / "truth.txt").write_text("w7 w1900 w12 w77 w8\nw500 w7 w33 w9\n")
    return made


def command(sent, *more):
    return ["reconstruct", str(sent.client), "--global", str(sent.reference), "--base", str(sent.base), *more]


def test_words_scores_and_what_is_right_are_printed(sent):
    done = CliRunner().invoke(app, command(sent, "--truth", str(sent.client.parent / "truth.txt")))
    assert done.exit_code == 0, done.output
    for token in sent.tokens:
        assert f"'w{token}'" in done.output
    assert "w8'" not in done.output.replace("w8 ", "")  # the last of a text is read by nobody
    assert "trained on" in done.output
    assert "token_recall 1" in " ".join(done.output.split())
    assert "guessed" in done.output


def test_json_is_for_machines_and_the_page_for_people(sent, tmp_path):
    page = tmp_path / "page.html"
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps([{"text": "w7 w1900 w12 w77 w8"}, [500, 7, 33, 9]]))
    done = CliRunner().invoke(app, command(sent, "--json", "--html", str(page), "--truth", str(truth)))
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert {token["id"] for token in told["tokens"]} == sent.tokens
    assert {token["text"] for token in told["tokens"]} == {f"w{token}" for token in sent.tokens}
    assert told["metrics"]["token_recall"] == told["metrics"]["token_precision"] == 1.0
    assert told["certain"]
    assert told["certificate"] > 0.999
    text = page.read_text()
    assert "w1900" in text
    assert text.startswith("<!doctype html>")
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org", "")  # nothing is fetched


def test_adam_is_recognised_and_its_rate_found(sent, tmp_path):
    how = {"optimizer": "adamw", "rate": 2e-4}
    adam = lora_client(tmp_path, sent.base, [[7, 1900, 12, 77, 8], [500, 7, 33, 9]], kind="llama", r=2, **how)
    told = reconstruct_adapter(adam.client, adam.reference, str(adam.base), "lora_tokens", {}, Told(steps=1)).as_json()
    assert "1 step of adamw at a learning rate of 0.0002" in told["assumed"]
    found = {token["id"] for token in told["tokens"]}
    assert len(found & sent.tokens) >= 4  # of six: what a random model's large gradients leave in float32
    assert len(found - sent.tokens) <= 1


def test_labels_need_no_base(tmp_path):
    """A head that is trained tells its labels, whatever the base."""
    base = tiny_base("bert", tmp_path / "base")
    made = lora_client(tmp_path, base, [[7, 1900, 12], [500, 7, 33]], kind="bert", r=2)
    done = reconstruct_adapter(
        made.client, made.reference, None, "revealing_labels", {}, Told("sgd", 0.1, 1, batch_size=2)
    )
    assert set(done.as_json()["present"]) <= {0, 1}


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--method", "krum"], "unknown attack 'krum'"),
        (["--method", "ipm"], "ipm reconstructs nothing; methods that do:"),
        (["-A", "lenght=3"], "did you mean 'length'"),
        (["--optimizer", "lion"], "sgd, adam or adamw"),
        (["--base", "./nowhere"], "no such file or folder"),
        (["--truth", "nothing.txt"], "cannot be read as texts"),
        (["--memory", "3 apples"], "memory"),
    ],
)
def test_bad_input_is_one_error(sent, more, told):
    done = CliRunner().invoke(app, command(sent, *more))
    assert isinstance(done.exception, InputError)
    assert told in str(done.exception)


def test_an_adapter_that_does_not_pass_the_gate_is_not_read(sent, adapters):
    clients, _, _ = adapters
    with pytest.raises(InputError, match="client_00: tensor"):
        reconstruct_adapter(clients[0], sent.reference, str(sent.base), "lora_tokens", {}, Told())
    with pytest.raises(InputError, match="give --base"):
        reconstruct_adapter(sent.client, sent.reference, None, "revealing_labels", {}, Told(), truth=sent.client)
