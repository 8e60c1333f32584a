import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from model import tiny
from model.checkpoint import load_text_encoder
from model.golden import encoders
from model.prompt import clean, unused_tokens

GOLDEN = Path(__file__).parents[1] / "golden"
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    tiny.write(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder):
    return load_text_encoder(tiny.settings(folder))


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("  a \n teacher\t speaks ", "a teacher speaks"),
        ("one &amp;amp; two", "one & two"),
        ("&lt;b&gt;", "<b>"),
        ("schÃ¶n", "schön"),
        ("一位　老师", "一位 老师"),
    ],
)
def test_prompts_are_cleaned(prompt, cleaned):
    assert clean(prompt) == cleaned


def test_equal_cleaned_prompts_give_equal_embeddings(encoder):
    assert torch.equal(encoder.encode("a man  &amp;amp; a desk"), encoder.encode("a man & a desk"))


def test_embedding_is_unpadded_and_ends_with_the_end_token(encoder):
    embedding = encoder.encode("a teacher speaks")
    assert embedding.shape == (len(encoder.tokenizer.encode("a teacher speaks").ids), 32)
    assert encoder.tokenizer.encode("a").tokens[-1] == "</s>"
    assert embedding.dtype == torch.float32


def test_long_prompt_is_cut_as_transformers_cuts_it(encoder, folder):
    long = "studio " * 300
    assert unused_tokens(tiny.settings(folder), long) == 301 - encoder.text_len
    librarys = AutoTokenizer.from_pretrained(folder / "google/umt5-xxl")
    cut = librarys(long, truncation=True, max_length=encoder.text_len).input_ids
    assert cut[-1] == librarys.eos_token_id
    assert torch.equal(encoder.encode(long), encoder.encode_ids(torch.tensor(cut)))


def test_prompts_in_any_language_are_told_apart(encoder):
    assert "<unk>" not in encoder.tokenizer.encode("一位老师 🎓 Straße").tokens
    assert not torch.equal(encoder.encode("一位老师"), encoder.encode("一位学生"))


def test_tokenizer_class_of_the_published_config_does_not_replace_the_published_tokenizer(encoder, tmp_path):
    tiny.write(tmp_path / "a")
    config = tmp_path / "a" / "google/umt5-xxl/tokenizer_config.json"
    config.write_text(config.read_text().replace("PreTrainedTokenizerFast", "T5Tokenizer"))
    other = load_text_encoder(tiny.settings(tmp_path / "a"))
    assert torch.equal(other.encode("一位老师"), encoder.encode("一位老师"))


def test_empty_prompt_is_the_end_token_alone(encoder):
    assert encoder.encode("").shape == (1, 32)


def test_unmasked_padding_changes_the_embedding():
    arguments = json.loads((GOLDEN / "text_encoder.json").read_text())
    stored = load_file(GOLDEN / "text_encoder.safetensors")
    encoder = encoders.load_text_encoder(GOLDEN, arguments)
    length = arguments["valid_lengths"][0]
    padded = encoder.encode_ids(stored["input_ids"][0])[:length]
    assert (padded - stored["output"][0, :length]).abs().max() > 1e-3


def test_embedding_table_is_held_once(encoder):
    assert encoder.model.shared.weight is encoder.model.encoder.embed_tokens.weight
