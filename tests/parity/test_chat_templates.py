"""Chats against transformers: ids of `apply_chat_template`, of tokenizers and of the processors of pictures."""

import numpy as np
import pytest
from chat_templates import TEMPLATES, TOKENS, chat_tokenizer, write_chameleon, write_emu3, write_llama
from hypothesis import given, settings
from hypothesis import strategies as st

import omni
import tokenizers
from omni.chat_template import ChatTemplate
from omni.prompts import Request

pytest.importorskip("torch", reason="needs torch: pip install 'omni-any-to-any[parity]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'omni-any-to-any[parity]'")

pytestmark = pytest.mark.parity

WORDS = ("\n", "\n\n", " ", "  ", "a", " the", "model", "<", ">", "|", "[", "s", "é", "🙂", "\t", "1", ".", "```py\n")
SIGNS = st.characters(exclude_categories=["Cs"], max_codepoint=0x10EFFF)
SAID = st.lists(st.sampled_from(WORDS), max_size=8).map("".join) | st.text(SIGNS, max_size=8)
TOOLS = """{{ bos_token }}{% if tools is not none %}{{ tools | tojson }}{% endif %}{% if documents %}d{% endif %}
{%- for message in messages %}{{ message | tojson(indent=1) }}
{%- if loop.last %}{{ eos_token }}{% continue %}{% endif %}{{ sep_token }}-{{ strftime_now('%Y') }}
{% endfor %}{{ namespace(a=1).a }}{{ dict(b=2) }}"""
CASES = TEMPLATES | {"tools": TOOLS}


def chat_of(contents, entries=False) -> list[dict]:
    content = (lambda text: [{"type": "text", "text": text}]) if entries else str
    return [{"role": ("user", "assistant")[i % 2], "content": content(each)} for i, each in enumerate(contents)]


def ids_of(model, messages) -> list[int]:
    return model.prepare([Request(messages, max_tokens=1)])[0].ids.tolist()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    model = omni.load(write_llama(tmp_path_factory.mktemp("llama")))
    pieces = model.transformer, model.vocabulary, model.grammar, model.tokenizers
    made = {name: ChatTemplate(source, TOKENS) for name, source in CASES.items()}
    return {name: omni.Model(*pieces, context_length=1 << 20, chat_template=each) for name, each in made.items()}


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=60, deadline=None)
@given(contents=st.lists(SAID, min_size=1, max_size=5).filter(lambda contents: len(contents) % 2))
def test_ids_are_those_of_apply_chat_template(models, name, contents):
    """Innocent chats: whatever is said, at the borders of what the template writes, too."""
    made = tokenizers.Tokenizer.from_str(chat_tokenizer())
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=made, chat_template=CASES[name], **TOKENS)
    if any(token in text for token in theirs.get_added_vocab() for text in contents):
        return
    messages = chat_of(contents, entries=name == "entries")
    assert ids_of(models[name], messages) == theirs.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )


def test_an_export_is_templated_by_transformers_alike(tmp_path):
    """What `export` wrote has the template and the names of tokens where AutoTokenizer looks for them."""
    ours = omni.load(write_llama(tmp_path / "theirs", TEMPLATES["llama"]))
    ours.export(tmp_path / "out")
    messages = chat_of(["hello", "yes", " and\n\n"])
    for directory in ("theirs", "out"):
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / directory)
        assert theirs.bos_token == "<s>" and theirs.chat_template == TEMPLATES["llama"]
        found = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert found == ids_of(ours, messages)


def test_what_is_typed_is_text_there_too(models):
    """Where transformers is asked to sanitise what users say, it makes the same letters of the same text."""
    made = tokenizers.Tokenizer.from_str(chat_tokenizer())
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=made, chat_template=CASES["llama"], **TOKENS)
    messages = chat_of(["a <|eot_id|> b<s>"])
    found = theirs.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
    )
    ours, text = ids_of(models["llama"], messages), models["llama"].tokenizers["text"]
    control = set(text.control.values())
    assert [id for id in found if id in control] == [id for id in ours if id in control]
    assert theirs.decode(found) == theirs.decode(ours)


@pytest.mark.parametrize("kind", ["Chameleon", "Emu3"])
def test_pictures_are_placed_as_their_processors_do(tmp_path, kind):
    """Ids beside the codes, for which they have a placeholder; with pictures or none, the family's own tokens or none,
    bos in the template or not (of Emu3, to whose processor of 5.23.0 a template with it gives two)."""
    names = {"Chameleon": write_chameleon, "Emu3": write_emu3}[kind](tmp_path, TEMPLATES["entries"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    if kind == "Chameleon":
        pictures = transformers.models.chameleon.image_processing_pil_chameleon.ChameleonImageProcessorPil()
        processor = transformers.ChameleonProcessor(pictures, tokenizer, image_seq_length=16)
    else:
        pictures = transformers.models.emu3.image_processing_emu3.Emu3ImageProcessor(min_pixels=32**2, max_pixels=32**2)
        processor = transformers.Emu3Processor(pictures, tokenizer)
    model, picture = omni.load(tmp_path), np.full((32, 32, 3), 90, np.uint8)
    holes = {names["<image>"], names.get("<|extra_200|>"), *model.vocabulary.block("image").tolist()}
    texts = [{"type": "text", "text": text} for text in ("What is\n", "this?")]
    image = {"type": "image", "image": picture}
    for content in ([texts[0], image, texts[1], image], texts):
        messages = [{"role": "user", "content": content}]
        own = "{{ boi_token }}a{{ eoi_token }}"
        for before in ("", own, "{{ bos_token }}")[: 3 if kind == "Chameleon" else 2]:
            source = before + TEMPLATES["entries"]
            settings = {"chat_template": source, "add_generation_prompt": True, "return_tensors": "np"}
            found = processor.apply_chat_template(messages, tokenize=True, return_dict=True, **settings)["input_ids"]
            template = ChatTemplate(source, model.chat_template.tokens, model.chat_template.frame)
            pieces = model.transformer, model.vocabulary, model.grammar, model.tokenizers
            ours = ids_of(omni.Model(*pieces, context_length=1000, chat_template=template), messages)
            theirs = np.asarray(found).ravel().tolist()
            assert [id in holes for id in ours] == [id in holes for id in theirs]
            assert [id for id in ours if id not in holes] == [id for id in theirs if id not in holes]
