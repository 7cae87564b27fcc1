"""Tokenizers: any Hugging Face `tokenizer.json`, or a byte-level BPE trained here.

Only the `tokenizers` library reads and writes them; `transformers.AutoTokenizer` loads what is saved.
Chat templates are run by jinja2's sandbox, because a template is code that came with a download.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.core import gguf
from modicum.core.errors import CorruptError, UserError
from modicum.core.files import read_json, write_json, write_text

if TYPE_CHECKING:
    import tokenizers

EOS, PAD = "<|endoftext|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIALS = (EOS, PAD, *ROLES)
RESERVED = "<|reserved_{}|>"  # counted from the last id of the vocabulary downwards
# Words with their leading space, numbers in threes, runs of punctuation, runs of line ends and spaces:
# an indentation stays one pre-token and no merge crosses from a word into punctuation.
SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PLAIN_CHAT = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


class Tokenizer:
    """Text to token ids and back.

    eos_id ends a document; bos_id starts one where the model has such a token, else None;
    pad_id fills unused positions (the eos where the model has none); start_id begins a document
    in the shards: the bos, or else the eos. stop_ids end a generation.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos: str,
        bos: str | None = None,
        pad: str | None = None,
        template: str | None = None,
        settings: dict[str, Any] | None = None,
        stop_ids: Sequence[int] = (),
    ):
        self.backend = backend
        self.eos_token, self.bos_token, self.pad_token = eos, bos, pad or eos
        self.template = template
        self.settings = settings or {}
        self.eos_id = self._id(eos)
        self.bos_id = None if bos is None else self._id(bos)
        self.pad_id = self._id(self.pad_token)
        self.stop_ids = tuple(dict.fromkeys((self.eos_id, *stop_ids)))
        self._plain: tokenizers.Tokenizer | None = None

    def _id(self, token: str) -> int:
        number = self.backend.token_to_id(token)
        if number is None:
            raise UserError(f"the tokenizer has no token {token!r} although its settings name it")
        return int(number)

    @property
    def start_id(self) -> int:
        return self.eos_id if self.bos_id is None else self.bos_id

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def reserved(self) -> int:
        """Number of reserved special tokens (`RESERVED`) at the end of the vocabulary, for objectives."""
        count = 0
        while self.backend.token_to_id(RESERVED.format(count)) == self.vocab_size - 1 - count:
            count += 1
        return count

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that name the vocabulary and its rules."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()[:16]

    def _side(self, specials: bool) -> tokenizers.Tokenizer:
        """The backend that reads `<|...|>` as tokens, or the one that reads it as the characters it is."""
        if specials:
            return self.backend
        if self._plain is None:
            self._plain = type(self.backend).from_str(self.backend.to_str())
            self._plain.encode_special_tokens = True
        return self._plain

    def encode(self, text: str, *, specials: bool = True, add_special: bool = False) -> list[int]:
        """Token ids of `text`.

        specials=False reads a special token's name in the text as ordinary characters (documents,
        untrusted input). add_special=True adds what the model expects around a prompt, such as a bos.
        """
        return list(self._side(specials).encode(text, add_special_tokens=add_special).ids)

    def encode_batch(
        self, texts: Sequence[str], *, specials: bool = True, add_special: bool = False
    ) -> list[list[int]]:
        encoded = self._side(specials).encode_batch_fast(list(texts), add_special_tokens=add_special)
        return [list(e.ids) for e in encoded]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        return str(self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special))

    def chat(self, messages: Sequence[dict[str, Any]], *, generate: bool = True, **variables: Any) -> str:
        """The prompt text of a conversation ([{"role", "content"}, ...]) by the folder's own template.

        generate=True ends it where the assistant's reply begins. Encode it with specials=True and
        add_special=False. Raises UserError where the template refuses the messages.
        """
        import jinja2

        template = self.template
        if template is None:
            template = CHAT if all(self.backend.token_to_id(r) is not None for r in ROLES) else PLAIN_CHAT
        try:
            return str(
                _compiled(template).render(
                    messages=list(messages),
                    add_generation_prompt=generate,
                    eos_token=self.eos_token,
                    bos_token=self.bos_token or "",
                    pad_token=self.pad_token,
                    **variables,
                )
            )
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template does not accept these messages: {error}") from None
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise UserError(f"the chat template failed on these messages ({type(error).__name__}: {error})") from None

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, each atomically."""
        folder = Path(folder)
        write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1 << 20,
        } | self.settings
        settings |= {"eos_token": self.eos_token, "bos_token": self.bos_token, "pad_token": self.pad_token}
        if self.template is not None:
            settings["chat_template"] = self.template
        write_json(folder / "tokenizer_config.json", settings)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """From any folder with a tokenizer.json, or from a GGUF file or a folder with one. Raises UserError or
        CorruptError."""
        import tokenizers

        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file() and (stored := gguf.file_in(folder)) is not None:
            return cls._of_gguf(gguf.GgufFile(stored))
        if not file.is_file():
            raise UserError(
                f"{folder} has no tokenizer.json; give a folder with one (a model's folder, "
                "or the output of: modicum curate SOURCE --out FOLDER)"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise CorruptError(f"{file} cannot be read as a tokenizer ({error}); copy it again") from None
        backend.no_padding()
        backend.no_truncation()
        settings = _optional(folder / "tokenizer_config.json")
        special_map = _optional(folder / "special_tokens_map.json")
        special_map |= {name: value for name, value in settings.items() if value is not None}
        config = _optional(folder / "config.json")
        config |= config.get("text_config") or {}
        config |= _optional(folder / "generation_config.json")

        def token(name: str) -> str | None:
            value = special_map.get(f"{name}_token")
            value = value.get("content") if isinstance(value, dict) else value
            if value is None and f"{name}_token" not in settings:
                number = config.get(f"{name}_token_id")
                number = number[0] if isinstance(number, list) and number else number
                value = backend.id_to_token(number) if isinstance(number, int) and number >= 0 else None
            return value if value is not None and backend.token_to_id(value) is not None else None

        eos = token("eos") or next(
            (t for t in (EOS, "</s>", "<eos>", "<|im_end|>", "<|end_of_text|>") if backend.token_to_id(t) is not None),
            None,
        )
        if eos is None:
            raise UserError(f"{folder} has no end-of-text token; name its eos_token in tokenizer_config.json")
        stops = config.get("eos_token_id")
        stops = [s for s in (stops if isinstance(stops, list) else [stops]) if isinstance(s, int) and s >= 0]
        saved_settings = {k: v for k, v in settings.items() if k not in ("chat_template", "added_tokens_decoder")}
        return cls(
            backend,
            eos=eos,
            bos=token("bos"),
            pad=token("pad"),
            template=_template(folder, settings),
            settings=saved_settings,
            stop_ids=stops,
        )

    @classmethod
    def _of_gguf(cls, file: gguf.GgufFile) -> Tokenizer:
        from modicum.core.gguf.tokenizer import stop_ids, tokenizer_of, tokenizer_settings

        settings, stops = tokenizer_settings(file), stop_ids(file)
        backend = tokenizer_of(file)
        eos = settings["eos_token"] or (backend.id_to_token(stops[0]) if stops else None)
        if eos is None:
            raise UserError(f"{file.path} names no end-of-text token; give a folder with tokenizer.json instead")
        return cls(
            backend,
            eos=eos,
            bos=settings["bos_token"],
            pad=settings["pad_token"],
            template=file.metadata.get("tokenizer.chat_template"),
            settings=settings,
            stop_ids=stops,
        )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 8192, reserved: int = 0) -> Tokenizer:
        """A byte-level BPE (Sennrich et al. 2016; bytes as in Radford et al. 2019): no text is unknown to it.

        The same texts give the same tokenizer. `vocab_size` includes the 256 bytes, the special tokens, and
        `reserved` special tokens at its end, which no text is ever encoded to.
        """
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers

        if reserved < 0:
            raise UserError(f"reserved={reserved} must be a number of tokens, 0 or more")
        least = 256 + len(SPECIALS) + reserved
        if vocab_size < least:
            raise UserError(
                f"vocab_size={vocab_size} is too small; it must be at least {least} "
                f"(256 bytes and {len(SPECIALS) + reserved} special tokens)"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - reserved,
            special_tokens=list(SPECIALS),
            initial_alphabet=alphabet,
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        backend.add_special_tokens([RESERVED.format(i) for i in reversed(range(reserved))])
        return cls(backend, eos=EOS, pad=PAD, template=CHAT)


def _optional(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = read_json(path)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptError(f"{path} is not JSON ({error}); copy it again") from None
    return value if isinstance(value, dict) else {}


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    """chat_template.jinja, or the settings' own: a text, or a list of named ones."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    value = settings.get("chat_template")
    if isinstance(value, list):
        named = {t["name"]: t["template"] for t in value if isinstance(t, dict) and "template" in t}
        value = named.get("default") or next(iter(named.values()), None)
    return value if isinstance(value, str) else None


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    """Compiling takes milliseconds, and a set of pairs asks for the same template tens of thousands of times."""
    return _sandbox().from_string(template)


def _sandbox() -> Any:
    """The environment that published templates expect: trimmed blocks, tojson, raise_exception."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}...{% endgeneration %}` marks the assistant's own words; here its body only."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = lambda value, indent=None, **_: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
