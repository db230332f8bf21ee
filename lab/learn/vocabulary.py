"""A word-level tokenizer for the bundled model: a few hundred words, saved as an ordinary transformers tokenizer.

Capital initials are lowered before look-up ("Which" and "which" are one token); a capital that stands alone stays, so
the option letters A to Z are tokens of their own.
"""

from __future__ import annotations

import json
import string
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

SPECIAL: tuple[str, ...] = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")

TEXT = """
question options option only give the best answer user assistant system video clip frame frames image picture
which way direction does do did is are was were be been has have had will would can could should may must
what where when who whom whose why how many much often long far fast the a an this that these those it its they them
he she his her their there here one some any all both each every no not none neither other another same different
move moves moved moving movement go goes going went gone come comes coming turn turns turned turning travel travels
stay stays stayed still stop stops stopped start starts started begin begins began end ends ended appear appears
appeared appearing disappear disappears disappeared vanish vanishes enter enters entered leave leaves left right up
down upward upwards downward downwards leftward leftwards rightward rightwards sideways forward forwards backward
backwards north south east west clockwise counterclockwise around rotate rotates rotated rotating rotation spin spins
grow grows grew growing shrink shrinks shrank shrinking bigger smaller larger faster slower closer farther nearer
red green blue yellow orange purple pink brown black white grey gray cyan magenta colour color colours colors change
changes changed changing become becomes became square circle triangle star cross diamond rectangle hexagon ring dot
line arrow shape shapes object objects thing things ball box block background ground scene room wall floor sky road
kitchen street park beach forest office garden field water grass snow sand night day indoor outdoor inside outside
zero two three four five six seven eight nine ten eleven twelve first second third fourth fifth sixth last next
previous before after during while then until since once twice times time seconds minute minutes early late earlier
later begin beginning middle finally always never sometimes sequence order event events action actions happen happens
happened happening see sees saw seen show shows showed shown look looks looked looking watch describe tell say says
count name find choose pick point describe explain true false yes person man woman child people hand head dog cat
bird car bus bike train boat door window table chair cup book phone bag hat tree flower house
top bottom center centre corner edge side above below under over behind front between beside near next to from into
onto out off of on in at by with without for and or but if than as so also too very more most less least few
collide collides collided hit hits bounce bounces bounced touch touches touched pass passes passed cross crosses
crossed follow follows followed push pushes pull pulls drop drops fall falls fell rise rises rose jump jumps open
opens opened close closes closed put puts take takes took pick picks hold holds big small large little tall short wide
narrow round flat new old light dark bright slow quick speed distance size position place path i you we me my your
ok please correct wrong
"""
WORDS: tuple[str, ...] = tuple(TEXT.split())

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'video' %}{{ '<video>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ '\\n' + part['text'] }}{% endfor %}"
    "{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def token_ids() -> dict[str, int]:
    """Token -> id: special tokens, letters, digits, punctuation, words."""
    names = [*SPECIAL, *string.ascii_uppercase, *string.digits, *string.punctuation, *WORDS]
    return {name: i for i, name in enumerate(dict.fromkeys(names))}


def build() -> Tokenizer:
    """The tokenizer itself. Splits at white space (dropped), punctuation and single digits."""
    tokenizer = Tokenizer(models.WordLevel(token_ids(), unk_token="<unk>"))
    # same length, so character offsets stay those of the text as written
    lower = [normalizers.Replace(Regex(rf"\b{c}(?=[a-z])"), c.lower()) for c in string.ascii_uppercase]
    tokenizer.normalizer = normalizers.Sequence(lower)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Digits(True),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    return tokenizer


def save(folder: str | Path) -> Path:
    """Write tokenizer.json and tokenizer_config.json (with the chat template)."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    build().save(str(Path(folder) / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "eos_token": "<|im_end|>",
        "padding_side": "left",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return Path(folder)
