"""The `qwen` encoder against transformers' model and tokenizer with torch's pooling."""

import dataclasses
import hashlib
import json
import time

import jax.numpy as jnp
import numpy as np
import pytest
from support.torch_models import TOLERANCE
from support.torch_qwen2 import CHAT, save_qwen

from psa_jax.errors import PSAError
from psa_jax.interop.qwen2 import load_qwen2
from psa_jax.profiles import qwen_encoder
from psa_jax.profiles.bans import banned_categories
from psa_jax.profiles.encoders import Encoder
from psa_jax.profiles.population import sample_population
from psa_jax.profiles.profile_prompt import PROFILE, QUESTION, Answer, Template
from psa_jax.profiles.qwen_encoder import QwenEncoder, load_qwen_encoder
from psa_jax.profiles.schema import CATEGORIES, UserProfile
from psa_jax.profiles.table import EmbeddingTable

USERS = sample_population(5)


def prompt(text: str, user: UserProfile, banned) -> str:
    """As the torch original fills it: one replacement after the other."""
    allowed = [category for category in CATEGORIES if category not in banned]
    fields = {"AGE": user.age, "AGE_GROUP": user.age_group, "GENDER": user.gender, "RELIGION": user.religion}
    fields |= {"MENTAL": user.mental_condition, "PHYSICAL": user.physical_condition}
    for field, value in (fields | {"BANNED": list(banned), "ALLOWED": allowed}).items():
        text = text.replace(f"<<{field}>>", str(value))
    return text


def torch_states(model, tokenizer, texts: list[str], pooling: str) -> np.ndarray:
    if tokenizer.chat_template is not None:
        messages = [[{"role": "user", "content": text}] for text in texts]
        texts = [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in messages]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    mask = inputs["attention_mask"][..., None]
    assert mask[:, -1].all()  # padded on the left
    total = (model(**inputs, output_hidden_states=True).hidden_states[-1] * mask).sum(1)
    return (total / mask.sum(1) if pooling == "mean" else total).numpy()


@pytest.fixture(scope="module", params=["tied_groups", "odd"])
def models(request, tmp_path_factory):
    """Folder, torch model, its tokenizer; the first has a chat template: read only."""
    folder = tmp_path_factory.mktemp(request.param)
    texts = [prompt(PROFILE.text, user, banned_categories(user)) for user in USERS]
    chat = CHAT if request.param == "tied_groups" else None
    return folder, *save_qwen(folder, request.param, texts, chat)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The smallest one, loaded: read only."""
    folder = tmp_path_factory.mktemp("small")
    texts = [prompt(PROFILE.text, user, banned_categories(user)) for user in USERS]
    return save_qwen(folder, "odd", texts, CHAT), load_qwen2(folder)


@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_against_torch(models, pooling):
    folder, model, tokenizer = models
    texts = [prompt(PROFILE.text, user, banned_categories(user)) for user in USERS]
    lengths = {len(ids) for ids in tokenizer(texts)["input_ids"]}
    assert len(lengths) > 2 and max(lengths) < 400  # padding is at work
    expected = torch_states(model, tokenizer, texts, pooling)
    encoder = load_qwen_encoder(folder, pooling=pooling, batch_size=3)  # the last batch is not full
    u = encoder.encode(USERS)
    assert u.shape == (5, encoder.dim) and u.dtype == np.float32 and encoder.dim == model.config.hidden_size
    assert np.ptp(expected, axis=0).max() > 0.01  # users differ by much more than the tolerance
    np.testing.assert_allclose(u, expected, rtol=1e-5 if pooling == "sum" else 0, atol=TOLERANCE)
    np.testing.assert_allclose(encoder.encode(USERS[3:4]), u[3:4], rtol=1e-5, atol=TOLERANCE)


def test_it_is_an_encoder_and_makes_tables(small, tmp_path):
    encoder = QwenEncoder(small[1])
    assert isinstance(encoder, Encoder) and encoder.name == "qwen"
    assert encoder.encode([]).shape == (0, encoder.dim)
    table = EmbeddingTable.from_profiles(USERS, encoder)
    table.save(tmp_path / "table.safetensors")
    again = EmbeddingTable.load(tmp_path / "table.safetensors")
    assert (again.encoder, again.fingerprint, again.dim) == ("qwen", encoder.fingerprint, 21)
    np.testing.assert_array_equal(again.embeddings, encoder.encode(USERS))


def test_the_fingerprint_holds_what_changes_the_numbers_and_nothing_else(small):
    lm = small[1]
    template = Template("<<AGE>>")
    encoders = [
        QwenEncoder(lm),
        QwenEncoder(lm, pooling="sum"),
        QwenEncoder(lm, template),
        QwenEncoder(lm, ask_model=True),
    ]
    encoders.append(QwenEncoder(lm, ask_model=True, max_new_tokens=9))
    assert len({encoder.fingerprint for encoder in encoders}) == 5
    assert QwenEncoder(lm, batch_size=2, max_new_tokens=9).fingerprint == encoders[0].fingerprint
    assert encoders[1].fingerprint.startswith("qwen-v1-sum-")
    notes = encoders[2].notes
    earlier = notes.pop("earlier_fingerprint")
    assert notes == {"pooling": "mean", "template": template.hash, "model": lm.fingerprint, "bans": "policy"}
    # As earlier versions made it: of the files' bytes in place of the model.
    settings = json.dumps(notes | {"model": lm.files_fingerprint}, sort_keys=True)
    assert earlier == f"qwen-v1-mean-{hashlib.sha256(settings.encode()).hexdigest()[:16]}"
    assert encoders[3].notes["bans"] == f"model {QUESTION.hash}, 64 tokens"


def test_tables_of_earlier_versions_are_of_the_same_encoder(small):
    """They are added to, and an adapter that was trained with one takes a table of today."""
    encoder = QwenEncoder(small[1])
    today = EmbeddingTable.from_profiles(USERS[:2], encoder)
    before = dataclasses.replace(
        today, fingerprint=today.notes["earlier_fingerprint"], notes={}, ids=["9000001", "9000002"]
    )
    before.check_encoder(encoder)
    both = before.joined(today)
    assert both.fingerprint == before.fingerprint and len(both.ids) == 4
    assert before.fingerprint in today.fingerprints
    other = QwenEncoder(small[1], pooling="sum")
    with pytest.raises(PSAError, match="use its encoder and settings"):
        before.check_encoder(other)


def test_a_template_file_replaces_the_prompt(small, tmp_path):
    (model, tokenizer), lm = small
    (tmp_path / "prompt.txt").write_text("<<MENTAL>>, <<AGE>>; <<BANNED>>")
    encoder = load_qwen_encoder(lm.folder, template=tmp_path / "prompt.txt")
    texts = [prompt("<<MENTAL>>, <<AGE>>; <<BANNED>>", user, banned_categories(user)) for user in USERS]
    expected = torch_states(model, tokenizer, texts, "mean")
    np.testing.assert_allclose(encoder.encode(USERS), expected, rtol=0, atol=TOLERANCE)


def test_replies_are_the_greedy_ones_and_a_random_models_ban_everything(small, monkeypatch):
    (model, tokenizer), lm = small
    encoder = QwenEncoder(lm, ask_model=True, batch_size=2, max_new_tokens=4)
    generate, seen = qwen_encoder._generate, []

    def recorded(*args):
        tokens = generate(*args)
        seen.extend(np.asarray(tokens).tolist())
        return tokens

    monkeypatch.setattr(qwen_encoder, "_generate", recorded)
    assert encoder.ask(USERS[:3]) == [Answer(None, CATEGORIES)] * 3
    assert len(seen) == 4  # the last batch is filled up
    for user, tokens in zip(USERS[:3], seen[:3], strict=True):
        messages = [{"role": "user", "content": prompt(QUESTION.text, user, ())}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer([text], return_tensors="pt")
        out = model.generate(**inputs, do_sample=False, max_new_tokens=4, pad_token_id=lm.stop_tokens[0])
        expected = out[0, inputs["input_ids"].shape[1] :].tolist()
        assert tokens[: len(expected)] == expected
    assert encoder.counts["asked"] == encoder.counts["unparsable"] == encoder.counts["Hate banned"] == 3


def test_the_models_bans_reach_the_prompt_and_the_notes(small, monkeypatch):
    (model, tokenizer), lm = small
    adults = [user for user in sample_population(60) if user.age >= 20][:1]
    minors = [user for user in sample_population(60) if user.age < 20][:2]
    users = [*adults, *minors]
    replies = ['["Hate"]', "[]", "as you like"]
    bans = [("Hate",), banned_categories(minors[0]), CATEGORIES]

    def scripted(model, ids, mask, room, stops):
        rows = [lm.tokenize([reply])[0] + [stops[0]] for reply in replies]
        return np.asarray([row + [stops[0]] * (room - len(row)) for row in rows])

    monkeypatch.setattr(qwen_encoder, "_generate", scripted)
    encoder = QwenEncoder(lm, ask_model=True, batch_size=3)
    texts = [prompt(PROFILE.text, user, banned) for user, banned in zip(users, bans, strict=True)]
    expected = torch_states(model, tokenizer, texts, "mean")
    fingerprint = encoder.fingerprint
    np.testing.assert_allclose(encoder.encode(users), expected, rtol=0, atol=TOLERANCE)
    counts = json.loads(encoder.notes["replies"])
    assert (counts["asked"], counts["unparsable"], counts["stricter by the rule for minors"]) == (3, 1, 1)
    assert (counts["Hate proposed"], counts["Hate banned"]) == (1, 2 + ("Hate" in bans[1]))
    assert encoder.fingerprint == fingerprint  # counts are notes


def test_bfloat16_is_near_float32(small):
    half = load_qwen_encoder(small[1].folder, dtype=jnp.bfloat16)
    full = QwenEncoder(small[1])
    assert half.fingerprint != full.fingerprint
    u = half.encode(USERS[:2])
    assert u.dtype == np.float32
    np.testing.assert_allclose(u, full.encode(USERS[:2]), rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": "max"}, "pooling 'max' does not exist; use one of: mean, sum"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
    ],
)
def test_bad_settings(small, settings, message):
    with pytest.raises(PSAError, match=message):
        QwenEncoder(small[1], **settings)


def test_what_the_model_cannot_read_is_refused(small, tmp_path):
    lm = small[1]
    with pytest.raises(PSAError, match=r"long: \d{4} tokens, the model reads 1024; shorten"):
        QwenEncoder(lm, Template("<<AGE>>" * 1100, "long")).encode(USERS)
    with pytest.raises(PSAError, match=r"question: \d+ tokens, the model reads 24"):
        QwenEncoder(lm, ask_model=True, max_new_tokens=1000).ask(USERS)
    theirs, _ = save_qwen(tmp_path, "odd", ["text"])
    theirs.generation_config.eos_token_id = theirs.config.eos_token_id = None
    theirs.save_pretrained(tmp_path)
    load_qwen_encoder(tmp_path)
    with pytest.raises(PSAError, match="no eos_token_id"):
        load_qwen_encoder(tmp_path, ask_model=True)
    theirs.model.norm.weight[:] = 3e38  # finite, and what it multiplies is not
    theirs.save_pretrained(tmp_path)
    with pytest.raises(PSAError, match="states are not finite"):
        load_qwen_encoder(tmp_path).encode(USERS[:1])


@pytest.mark.slow
def test_a_thousand_profiles(tmp_path):
    users = sample_population(1000)
    texts = [prompt(PROFILE.text, user, banned_categories(user)) for user in users]
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    model, tokenizer = save_qwen(tmp_path, "tied_groups", texts, CHAT, **sizes)
    encoder = load_qwen_encoder(tmp_path, batch_size=32)
    encoder.encode(users[:1])  # compiles
    seconds = {}
    start = time.perf_counter()
    ours = encoder.encode(users)
    seconds["Flax"] = time.perf_counter() - start
    start = time.perf_counter()
    theirs = [torch_states(model, tokenizer, texts[i : i + 32], "mean") for i in range(0, 1000, 32)]
    seconds["torch"] = time.perf_counter() - start
    difference = np.abs(ours - np.concatenate(theirs)).max()
    rates = ", ".join(f"{name} {1000 / s:.0f} profiles/s" for name, s in seconds.items())
    print(f"\n1,000 profiles, D = {encoder.dim}: largest absolute difference {difference:.1e}; {rates}")
    assert difference <= TOLERANCE < np.ptp(ours, axis=0).max()
