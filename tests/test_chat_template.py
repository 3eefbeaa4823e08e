"""Chats as a public model's own template writes them: its ids, control tokens from the template alone, files."""

import dataclasses
import json

import jinja2.sandbox
import numpy as np
import pytest
from chat_templates import (
    BARE,
    CHATML,
    ENTRIES,
    IDS,
    LLAMA,
    PLAIN,
    SPECIAL,
    TEMPLATES,
    TOKENS,
    chat_tokenizer,
    write_chameleon,
    write_emu3,
    write_llama,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from text_json import THINK

import omni
import tokenizers
from omni.chat_template import ChatTemplate
from omni.prompts import Request
from omni_tokenizers.errors import OmniError, UsageError
from omni_tokenizers.text_json import JsonTextTokenizer

NAMES = (*SPECIAL, *PLAIN, THINK, "<s>", "</s>", "<unk>")
WORDS = ("\n", "\n\n", " ", "  ", "a", " the", "model", "<", ">", "|", "[", "s", "é", "🙂", "\t", "1", ".")
SIGNS = st.characters(exclude_categories=["Cs"], max_codepoint=0x10EFFF)
SAID = st.lists(st.sampled_from(WORDS), max_size=8).map("".join) | st.text(SIGNS, max_size=8)
SPELLED = st.lists(
    st.sampled_from((*NAMES, *(name[:cut] for name in NAMES for cut in (1, 3)), *(name[3:] for name in NAMES), *WORDS)),
    max_size=6,
)


def with_template(model, source, tokens=TOKENS, context_length=1 << 20):
    """The same model, reading chats by a template."""
    pieces = model.transformer, model.vocabulary, model.grammar, model.tokenizers
    return omni.Model(*pieces, context_length=context_length, chat_template=ChatTemplate(source, tokens))


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory):
    return omni.load(write_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def models(plain_model):
    return {name: with_template(plain_model, source) for name, source in TEMPLATES.items()}


def chat_of(contents) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def ids_of(model, messages) -> list[int]:
    return model.prepare([Request(messages, max_tokens=1)])[0].ids.tolist()


def marks_of(ids, template: str, added: bool = True) -> list[int]:
    """The tokens that only this template may write: special ones, and of `added` ones those whose names it has."""
    names = [*SPECIAL, *(name for name in PLAIN if added and name in template)]
    return [id for id in ids if id in {0, 1, 2, *map(IDS.get, names)}]


def plainly(source, messages, entries=False, **more) -> list[int]:
    """What Jinja and the package `tokenizers` make of them, without any care for what is typed."""

    def refuse(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    source = source.replace("{%- generation %}", "").replace("{% endgeneration %}", "")
    if entries:
        messages = [each | {"content": [{"type": "text", "text": each["content"]}]} for each in messages]
    text = environment.from_string(source).render(messages=messages, add_generation_prompt=True, **TOKENS, **more)
    return tokenizers.Tokenizer.from_str(chat_tokenizer()).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(contents=st.lists(SAID, min_size=3, max_size=3), system=st.none() | SAID)
def test_ids_are_those_of_the_template(models, name, contents, system):
    """Rendered by Jinja alone and encoded as one text, innocent chats have the same ids: pieces that reach over what is
    said into what the template writes included."""
    said = [*contents, system or ""]
    if any(name in text for name in NAMES for text in said):
        return
    messages = chat_of(contents)
    if system is not None and name != "mistral":
        messages = [{"role": "system", "content": system}, *messages]
    assert ids_of(models[name], messages) == plainly(TEMPLATES[name], messages, entries=name == "entries")


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(spelled=st.lists(SPELLED, min_size=3, max_size=3), apart=st.booleans())
def test_control_tokens_are_never_typed(models, name, spelled, apart):
    """Names of control tokens, whole, in halves, one behind the other and in parts of their own: the prompt has the
    control tokens of one that says nothing, and all that was typed is there as letters."""
    model, contents = models[name], ["".join(pieces) for pieces in spelled]
    messages = chat_of([[omni.Text(piece) for piece in pieces] for pieces in spelled] if apart else contents)
    ids = np.array(ids_of(model, messages))
    watched = TEMPLATES[name], not any(each in contents[1] for each in PLAIN)  # which the model itself may have said
    assert marks_of(ids, *watched) == marks_of(ids_of(model, chat_of(["a", "b", "c"])), *watched)
    if name != "entries" and not (name == "chatml" and "</think>" in contents[1]):
        codes = model.vocabulary.to_codes("text", ids)
        assert all(content.strip() in model.tokenizers["text"].decode(codes) for content in contents)


def normalized(model, normalizer):
    """The same model, whose added tokens are found in what its tokenizer's normalizer has made of a text."""
    text = model.tokenizers["text"]
    content = json.loads(chat_tokenizer()) | {"normalizer": normalizer}
    for token in content["added_tokens"]:
        token["normalized"] = not token["special"]
    tokenizer = JsonTextTokenizer(json.dumps(content).encode(), text.ids)
    pieces = model.transformer, model.vocabulary, model.grammar, {"text": tokenizer}
    return omni.Model(*pieces, context_length=1 << 20, chat_template=model.chat_template)


@pytest.mark.parametrize("normalizer", [None, {"type": "Sequence", "normalizers": []}, {"type": "NFKC"}])
@pytest.mark.parametrize("typed", ["<|User|>a<|Assistant|>", "\uff1c|User|\uff1ea"])
def test_what_users_type_marks_no_speaker(models, normalizer, typed):
    """Added tokens that are not special but that the template writes are letters in what users say, also where the
    tokenizer looks for them in normalized text; what the model has said keeps them."""
    model, kept = normalized(models["plain"], normalizer), typed.startswith("<")
    assert ids_of(model, chat_of([typed])).count(IDS["<|User|>"]) == 1
    assert ids_of(model, chat_of(["a", typed, "c"])).count(IDS["<|User|>"]) == 2 + kept
    assert ids_of(model, chat_of(["a", "b", "c"])) == ids_of(models["plain"], chat_of(["a", "b", "c"]))
    assert ids_of(models["plain"], chat_of([typed])).count(IDS["<|User|>"]) == 1
    assert ids_of(models["llama"], chat_of(["<|User|>"])).count(IDS["<|User|>"]) == 1  # not of this template: text
    tokens, source = TOKENS | {"user_token": "<|User|>"}, "{{ user_token }}{{ messages[0].content }}"
    assert ids_of(with_template(model, source, tokens), chat_of([typed])).count(IDS["<|User|>"]) == 1


def test_typed_names_are_letters_in_json(models):
    """Where a template writes what is said as JSON in ASCII, signs do not become letters: the prompt is that of the
    text, and a name of a control token is none."""
    model = with_template(models["llama"], "{{ bos_token }}{{ messages[0].content | tojson(ensure_ascii=true) }}")
    ids = np.array(ids_of(model, chat_of(["é 🙂 <|eot_id|>"])))
    said = model.tokenizers["text"].decode(model.vocabulary.to_codes("text", ids))
    assert said == r'"\u00e9 \ud83d\ude42 <|eot_id|>"' and marks_of(ids.tolist(), "") == [1]


def test_a_name_that_the_template_puts_together_is_refused(plain_model):
    """It cannot be told from a typed one; it is not silently written in letters."""
    source = "{% for message in messages %}{{ '<|im_' + 'start' ~ '|>' + message.content }}{% endfor %}"
    with pytest.raises(OmniError, match=r"becomes the piece '<\|im_start\|>'"):
        ids_of(with_template(plain_model, source), chat_of(["a"]))


def test_signs_of_the_template_are_refused_in_texts(models):
    """Neither they nor the sign that breaks names can be smuggled in."""
    for sign in ("\U0010f000", "\U0010f003", "\U0010fffd", "\U0010ffff"):
        with pytest.raises(UsageError, match=r"a sign from U\+10F000 on"):
            ids_of(models["llama"], chat_of([f"a{sign}b"]))


def test_what_the_template_says_is_told(models, plain_model):
    """Its refusal, its mistakes, and a template that is none; without messages none of it matters."""
    with pytest.raises(OmniError, match="refuses these messages: only user and assistant may speak"):
        ids_of(models["mistral"], [{"role": "system", "content": "a"}, *chat_of(["b"])])
    for source, message in (
        ("{% if %}", "cannot be read"),
        ("{{ messages[0].content + 1 }}", "fails .TypeError"),
        ("", "has tokens"),
    ):
        broken = with_template(plain_model, source, context_length=160)
        with pytest.raises(OmniError, match=message):
            broken.serve(1).add(Request(chat_of(["a"]), max_tokens=1))
        broken.serve(1).add(Request(["a"], max_tokens=1))


def test_prompts_that_are_no_chats_are_documents(models, plain_model):
    """A list of parts, and messages to a model without a template, are what they always were."""
    np.testing.assert_array_equal(ids_of(models["llama"], ["a", "b"]), ids_of(plain_model, ["a", "b"]))
    turn = plain_model.grammar.control["turn"]
    assert ids_of(plain_model, chat_of(["a", "b", "c"])).count(turn) == 3


def test_guidance_is_against_an_empty_message(models):
    """The prompt that guidance weighs against is the template's of nothing said, and asks for no other rendering."""
    prepared = models["llama"].prepare([Request(chat_of(["a", "b", "c"]), guidance=2.0, max_tokens=1)])[0]
    assert [shadow.ids.tolist() for shadow in prepared.shadows] == [ids_of(models["llama"], chat_of([""]))]


# Where the template lies, and what it decides


def default_of(source):
    return [{"name": "tool_use", "template": "x"}, {"name": "default", "template": source}]


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, None),
        ({"tokenizer_config.json": TOKENS}, None),
        ({"tokenizer_config.json": TOKENS | {"chat_template": CHATML}}, CHATML),
        ({"tokenizer_config.json": {"chat_template": default_of(CHATML)}}, CHATML),
        ({"tokenizer_config.json": {"chat_template": [{"name": ["a"], "template": "x"}]}}, None),
        ({"chat_template.json": {"chat_template": CHATML}}, CHATML),
        ({"tokenizer_config.json": {"chat_template": CHATML}, "chat_template.json": {"chat_template": "x"}}, CHATML),
        ({"tokenizer_config.json": {"chat_template": "x"}, "chat_template.jinja": LLAMA}, LLAMA),
    ],
)
def test_where_templates_lie(tmp_path, files, found):
    """chat_template.jinja, else tokenizer_config.json, a string or the default of a list, else chat_template.json."""
    write_llama(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    template = ChatTemplate.of_checkpoint(tmp_path, ("", ""), {})
    assert (template and template.source) == found


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chat_template.jinja", b"\xff", "not text in UTF-8"),
        ("chat_template.jinja", b"a" * (1 << 20 | 1), "larger than 1048576 bytes"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "no string"),
        ("tokenizer_config.json", rb'{"chat_template": "a\ud800"}', "not valid Unicode"),
        ("tokenizer_config.json", '{"chat_template": "%s"}' % ("é" * (1 << 19 | 1)), "larger than 1048576 bytes"),
        ("tokenizer_config.json", b"[", "not valid JSON"),
        ("chat_template.json", b'{"template": "a"}', "no string"),
    ],
)
def test_damaged_files_are_told(tmp_path, name, content, message):
    write_llama(tmp_path)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(OmniError, match=f"{name}: .*{message}"):
        omni.load(tmp_path)


@pytest.mark.parametrize("way", ["save", "export"])
def test_templates_go_along(tmp_path, way):
    """Saved and exported, a model reads chats as before; into the place of another, one without leaves none there."""
    model = omni.load(write_llama(tmp_path / "theirs", LLAMA))
    getattr(model, way)(tmp_path / "ours")
    again = omni.load(tmp_path / "ours")
    assert again.chat_template == model.chat_template and again.chat_template.source == LLAMA
    assert ids_of(again, chat_of(["a"])) == ids_of(model, chat_of(["a"])) == plainly(LLAMA, chat_of(["a"]))
    getattr(omni.load(write_llama(tmp_path / "bare")), way)(tmp_path / "ours")
    assert omni.load(tmp_path / "ours").chat_template is None


def test_without_names_of_tokens_those_of_config_json_count(tmp_path):
    """bos and eos have the names that the tokenizer gives to their ids."""
    write_llama(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(LLAMA)
    assert omni.load(tmp_path).chat_template.tokens == TOKENS


@pytest.mark.parametrize(
    ("template", "end"), [(LLAMA, "<|eot_id|>"), (CHATML, "<|im_end|>"), (BARE, "</s>"), (None, "</s>")]
)
def test_replies_end_as_the_template_closes_them(tmp_path, template, end):
    """Of several eos_token_id the one behind what an assistant says ends replies; without one the first does."""
    ends = [2, IDS["<|eot_id|>"], IDS["<|im_end|>"]]
    model = omni.load(write_llama(tmp_path / "theirs", template, eos_token_id=ends))
    expected = {"</s>": 2}.get(end) or IDS[end]
    assert model.grammar.control["eos"] == expected
    assert not set(ends) & set(model.vocabulary.block("text").tolist())
    if template == LLAMA:
        assert model.generate(chat_of(["a"]), ["text"], seed=0, max_tokens=4, temperature=1.0).ids[-1] == expected
    model.export(tmp_path / "out")
    assert sorted(json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"]) == ends


def test_an_end_that_is_not_marked_special_ends_replies(tmp_path):
    """What config.json says ends replies is no text to the template, whatever the tokenizer's file says of it."""
    end = IDS["<|im_end|>"]
    for ends, template in (([2, end], CHATML), (end, BARE)):
        write_llama(tmp_path, eos_token_id=ends)
        (tmp_path / "chat_template.jinja").write_text(template)
        content = chat_tokenizer(special=tuple(name for name in SPECIAL if name != "<|im_end|>"))
        (tmp_path / "tokenizer.json").write_text(content)
        model = omni.load(tmp_path)
        assert model.grammar.control["eos"] == end and end not in model.vocabulary.block("text").tolist()
        assert isinstance(ends, list) or model.chat_template.tokens["eos_token"] == "<|im_end|>"


def test_a_template_needs_a_tokenizer_of_its_kind(tiny_model):
    """Of a model with another text tokenizer it is told when messages are prompted."""
    model = with_template(tiny_model, LLAMA)
    with pytest.raises(OmniError, match=r"that is a tokenizer.json.*: add tokenizer.json to.*, or remove"):
        model.generate(chat_of(["a"]))


# Chats


@pytest.fixture(scope="module")
def llama(plain_model):
    return with_template(plain_model, LLAMA, context_length=160)


SETTINGS = {"max_tokens": 6, "temperature": 1.0}


def shared(left, right) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


@pytest.mark.parametrize("rewritten", [False, True])
def test_a_chats_turns_are_what_its_messages_are(llama, rewritten):
    """Each reply is the one that all messages together get, and what the cache holds of their prompt is not read again:
    where the template shortens what was said before, little of it."""
    source = LLAMA.replace("message['content'] | trim", "(message['content'] | trim)[:2]") if rewritten else LLAMA
    model = with_template(llama, source, context_length=160)
    chat, said, held = model.chat("be brief"), [{"role": "system", "content": "be brief"}], []
    for seed, content in enumerate(["hello", "and then?"]):
        said.append({"role": "user", "content": content})
        ids, before = ids_of(model, said), model.engine.counts["read"]
        reply = chat.send(content, ["text"], seed=seed, **SETTINGS)
        kept = shared(held, ids)
        assert model.engine.counts["read"] - before == len(ids) - (kept if 2 * kept > len(held) else 0)
        assert rewritten or seed == 0 or kept > len(held) // 2
        np.testing.assert_array_equal(reply.ids, model.generate(said, ["text"], seed=seed, **SETTINGS).ids)
        held = [*ids, *reply.ids[:-1].tolist()]
        said.append({"role": "assistant", "content": list(reply.parts)})
    assert [message.role for message in chat.messages] == ["system", *["user", "assistant"] * 2]


def test_servers_and_streams_read_chats_by_the_template(llama):
    """Beside prompts that are none, each gets the reply that it gets alone."""
    asked = [
        Request(chat_of(["hello"]), ["text"], seed=1, **SETTINGS),
        Request(["hello"], ["text"], seed=1, **SETTINGS),
    ]
    alone = [llama.generate_batch([request])[0].ids for request in asked]
    assert not np.array_equal(*alone)
    for reply, expected in zip(llama.generate_batch(asked), alone, strict=True):
        np.testing.assert_array_equal(reply.ids, expected)
    *_, last = llama.stream(chat_of(["hello"]), ["text"], seed=1, **SETTINGS)
    np.testing.assert_array_equal(last.reply.ids, alone[0])


# Pictures

PICTURE = np.full((8, 8, 3), 90, np.uint8)
SEEN = [{"role": "user", "content": ["What is ", PICTURE, "?"]}]


@pytest.fixture(scope="module")
def chameleon(tmp_path_factory):
    directory = tmp_path_factory.mktemp("chameleon")
    names = write_chameleon(directory, BARE)
    return omni.load(directory), names


def rewritten(model, source):
    """The same model with another template of the same tokens."""
    template = dataclasses.replace(model.chat_template, source=source)
    pieces = model.transformer, model.vocabulary, model.grammar, model.tokenizers
    return omni.Model(*pieces, context_length=160, chat_template=template)


@pytest.mark.parametrize("source", [BARE, ENTRIES])
def test_pictures_stand_where_the_template_puts_them(chameleon, source):
    """In what is said, or where it goes through entries by type, at its placeholder; a Chameleon's prompt begins with
    bos and ends with its separator, as its processor writes it."""
    names, model = chameleon[1], rewritten(chameleon[0], source)
    picture = model.grammar.span_ids(model.processor.spans([[omni.Image(PICTURE)]])[0][0]).tolist()
    ids = ids_of(model, SEEN)
    place = ids.index(names["<racm3:break>"])
    before, behind = ids[:place], ids[place + len(picture) :]
    assert ids[place : place + len(picture)] == picture and len(picture) == 18
    codes = [model.vocabulary.to_codes("text", np.array(each)) for each in (before[1:], behind[:-1])]
    shown = [model.tokenizers["text"].decode(each) for each in codes]
    assert shown == (["What is ", "?"] if source == BARE else ["USER: ", "\nWhat is  ? ASSISTANT:"])
    assert before[0] == 1 and behind[-1] == names["<reserved08706>"] == model.grammar.control["turn"]
    if source == BARE:
        assert model.generate(SEEN, ["text"], seed=0, max_tokens=4, temperature=1.0).well_formed


def test_templates_have_the_models_own_names_of_tokens(chameleon):
    """Not bos and eos alone: a picture's, which is its place, and those around it."""
    model, names = chameleon
    ids = ids_of(rewritten(model, BARE.replace("}}", "}}{{ eoi_token }}")), chat_of(["a"]))
    assert ids[-2:] == [names["<eoss>"], names["<reserved08706>"]]
    assert ids_of(rewritten(model, ENTRIES.replace("'<image>\n'", "image_token")), SEEN).count(ids[-2]) == 1


def test_a_part_that_the_template_has_no_place_for_is_refused(chameleon):
    """By its name, and so are places without parts; a name of the placeholder that is typed is none."""
    model, typed = chameleon[0], "<image><racm3:break>IMGIMGAZ"
    for source, times in ((ENTRIES.replace("<image>", ""), "image 1 times.*shows 0"), (BARE + "<image>", "shows 2")):
        with pytest.raises(OmniError, match=times):
            ids_of(rewritten(model, source), SEEN)
    codes = model.vocabulary.to_codes("text", np.array(ids_of(model, chat_of([typed]))[1:-1]))
    assert (codes >= 0).all() and model.tokenizers["text"].decode(codes) == typed


def test_guidance_by_media_leaves_the_texts_out(chameleon):
    """The prompt of pictures alone is the template's of them alone."""
    model = chameleon[0]
    prepared = model.prepare([Request(SEEN, ["image"], guidance=3.0, media_guidance=1.2)])[0]
    found = {tuple(shadow.ids.tolist()) for shadow in prepared.shadows}
    said = ([PICTURE], "")
    assert found == {tuple(ids_of(model, [{"role": "user", "content": content}])) for content in said}


REFUSES_NOTHING_SAID = BARE.replace("{{", "{% if not message.content %}{{ raise_exception('say it') }}{% endif %}{{")


def test_shadows_that_weigh_nothing_are_not_written(chameleon):
    """A template that refuses empty messages answers where guidance is of modalities that the reply lacks, or against
    pictures alone; where guidance needs an empty message, the error says so."""
    model, guidance = rewritten(chameleon[0], REFUSES_NOTHING_SAID), {"image": 3.0}
    assert not model.prepare([Request(chat_of(["a"]), ["text"], guidance=guidance)])[0].shadows
    (shadow,) = model.prepare([Request(SEEN, ["image"], guidance=guidance, media_guidance=1.0)])[0].shadows
    assert shadow.ids.tolist() == ids_of(model, [{"role": "user", "content": [PICTURE]}])
    assert shadow.weight.tolist() == [0, -2]
    for want in (["image"], None):
        with pytest.raises(OmniError, match=r"say it.*guidance"):
            model.prepare([Request(chat_of(["a"]), want, guidance=guidance)])


def test_emu3_reads_chats(tmp_path):
    """bos, which its processor puts before what the template writes; pictures of a size in plain text, also of one that
    is read and never drawn."""
    names = write_emu3(tmp_path, ENTRIES)
    model = omni.load(tmp_path)
    spelling, wide = model.grammar.layouts["image"].spelling, np.full((11, 24, 3), 90, np.uint8)
    for picture, size, codes in ((PICTURE, "4*4", 16), (wide, "2*5", 10)):
        ids = ids_of(model, [{"role": "user", "content": ["What is ", picture, "?"]}])
        assert ids[0] == 1 and ids.count(1) == 1 and ids.count(names["<|image start|>"]) == 1
        place = ids.index(names["<|image start|>"]) + 1
        assert ids[place : place + 4] == [*(spelling[character] for character in size), names["<|image token|>"]]
        assert np.isin(ids, model.vocabulary.block("image")).sum() == codes
        assert model.grammar.annotate_chat(np.array(ids))[-1] == model.grammar.tables.after_turn
    messages = [{"role": "user", "content": ["What is ", wide, "?"]}]
    assert model.generate(messages, ["text"], seed=0, max_tokens=4, temperature=1.0).well_formed


def test_what_a_template_leaves_open_is_no_prompt(models):
    """A picture must be whole, and between parts anything may stand; a reply follows."""
    grammar = models["llama"].grammar
    assert grammar.annotate_chat(np.array([2, 405, 67, 1]))[-1] == grammar.tables.after_turn
    with pytest.raises(OmniError, match="outside"):
        grammar.annotate_chat(np.array([1, 10_000]))


# Text tokenizers of other kinds


def legacy(first: bool) -> str:
    """A tokenizer.json with bytes behind its pieces, and spaces as in Llama 2: before all text, or before the first."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>", *bytes_, "▁", "a", "b", "▁a", "ab", "▁▁"])}
    merges = [("▁", "a"), ("a", "b"), ("▁", "▁")]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    if first:
        made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        steps = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        made.normalizer = tokenizers.normalizers.Sequence(steps)
    made.add_special_tokens([tokenizers.AddedToken("[E]", lstrip=True), tokenizers.AddedToken("[S]", rstrip=True)])
    return made.to_str()


@pytest.mark.parametrize("first", [True, False])
@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(
        st.lists(st.sampled_from(["a", " ", "b", "ab", "\n", "<s", "é"]), max_size=5).map("".join), max_size=4
    )
)
def test_prompts_are_encoded_as_one_text(first, texts):
    """Whatever the tokenizer does at the beginning of a text, and around tokens that take the space beside them."""
    model = legacy(first)
    ours, theirs = JsonTextTokenizer(model.encode()), tokenizers.Tokenizer.from_str(model)
    tokens = [1, ours.control["[S]"], ours.control["[E]"], 2]
    names = ["<s>", "[S]", "[E]", "</s>"]
    pieces = [piece for pair in zip(texts, tokens, strict=False) for piece in pair]
    text = "".join(piece for pair in zip(texts, names, strict=False) for piece in pair)
    first_stretch, *rest = ours.encode_between(pieces)
    found = [
        *ours.ids[first_stretch],
        *(i for id, codes in zip(tokens, rest, strict=False) for i in (id, *ours.ids[codes])),
    ]
    assert found == theirs.encode(text, add_special_tokens=False).ids
