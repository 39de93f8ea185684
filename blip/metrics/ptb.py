r"""Captions to words as COCO's evaluation sees them: the tokens of Stanford's PTBTokenizer, in Python, without Java.

The COCO toolkit runs CoreNLP 3.4.1 with `-preserveLines -lowerCase` over all captions, one a line, and then drops a list of
punctuation tokens. Its scanner takes at each place the longest text that any rule matches, the first rule where two are equal;
so does this one. The rules here were written and measured against that program from outside: `tests/metrics/test_ptb.py`
compares with it where Java is. What it does to a text is part of the metric, oddities included:

- brackets become the words `-lrb-`, `-rrb-`, `-lsb-` ... and stay (the toolkit's list names them in capitals);
- a typographic apostrophe becomes a plain one in "it's" and "don't", and stays as it is in "O'Neil" and "o'clock";
- `?!` and `!!` stay, as does a pair of curly quotes; a lone mark goes;
- "cannot" is two words, as are "it's", "don't", "gonna"; "T-shirt", "black/white", "U.S." and "Mr." are one;
- numbers that look like a telephone number are one word with a no-break space;
- a character outside Unicode's first plane (emoji) is dropped, and so are a few signs within it;
- the full stop of a single letter that ends a line belongs to it ("plan b.") unless the next line begins with A, The, In ...
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

DROPPED = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";")
)

# Characters. A letter is one of any script with the marks that its script writes on it; numerals like ² or Ⅷ are none.
_MARKS = (
    "\u00ad\u02c2-\u036f\u0384\u0385\u0483-\u0487\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0615-\u061a\u064b-\u065e"
    "\u0670\u06d6-\u06ed\u0730-\u074a\u0900-\u0903\u093a-\u094f\u0951-\u0957\u0962\u0963\u0981-\u0983\u09bc-\u09d7\u0a01-\u0a03"
    "\u0a3c-\u0a51\u0a81-\u0a83\u0abc-\u0acd\u0b82\u0bbe-\u0bcd\u0c01-\u0c03\u0c3e-\u0c56\u0d3e-\u0d48\u0e31-\u0e3a\u0e47-\u0e4e"
)
_NUMERALS = r"\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u2089\u2150-\u2189\u2460-\u24ff\u2776-\u2793\U00010000-\U0010ffff"
# Some of the marks are letters to `re`: only one of the ways here may take them, or a run of them would be tried in all mixtures.
_LETTER = rf"(?:[^\W\d_{_NUMERALS}]|(?![^\W\d_{_NUMERALS}])[{_MARKS}]|&[aeiou](?:acute|grave|uml);)"
_ALNUM = rf"[^\W_{_NUMERALS}]"  # without marks
_SIGN = (
    "!-/:-@\\[-`{-~\u0080\u0085\u0091-\u0094\u0096\u0097\u00a1-\u00bf\u00d7\u00f7\u037e\u0387\u0589\u060c\u061b\u061f\u066a\u06d4\u0964"
    "\u0965\u0e3f\u0e4f\u2010\u2011\u2013-\u2023\u2026\u2030-\u203b\u203e-\u2042\u2044\u2070-\u208e\u20a0\u20a4\u20ac\u2100-\u2127"
    "\u212e\u2140-\u214f\u2153-\u215e\u2190-\u2bff\u3001\u3002\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
    "\uffe0\uffe1\uffe5\uffe6"
)

_APOSTROPHE = "(?:['\u2019\u0092]|&apos;)"
_WORD = rf"{_LETTER}(?:{_LETTER}|\d)*(?:[.!?]{_LETTER}(?:{_LETTER}|\d)*)*"
_PLAIN = rf"(?:{_LETTER}|\d)"
_NUMBER = r"(?:\d*(?:[.:,\u00ad\u066b\u066c]\d+)+|\d+)"
_ACRONYM = r"[A-Za-z](?:\.[A-Za-z])+"
_ENDING = (
    "3gp|avi|bat|bmp|c|class|cgi|cpp|dll|docx?|exe|flv|gif|gz|html?|h|jar|java|jpe?g|mov|mp[34g]|pdf|php|pl|png|ppt|ps|py|sql|tar|"
    "txt|wav|wm[av]|xml|x|zip"
)
# Words that keep their full stop; the second list also where a letter follows ("etc.a:").
_TITLES = (
    "adj|adm|adv|alex|assoc|attys?|ave|brig|capt|cf|cie|cmdr|col|comdr|cpl|dept|det|drs?|ens|ft|gen|govs?|hon|insp|jos|lieut|lt|maj|"
    "messrs|mfg|mme|mrs?|ms|mt|mtg|natl|pfc|ph|pres|prof|pvt|reps?|rev|sens?|sfc|sgt|spc|ste?|supts?|vs|wm"
)
_ABBREVIATIONS = (
    "ala?|apr|ariz|assn|aug|bancorp|bhd|bldg|blvd|bros|calif|colo|conn|corp|cos?|ct|dak|dec|esq|est|etc|ext|feb|fla|fri|ga|inc|ind|"
    "intl|jan|jr|jul|jun|kans?|ky|ltd|mar|md|mich|minn|mo|mon|mont|neb|nev|nov|oct|okla|penn|plc|pt[ey]|rd|rt|sept?|seq|sq|sr|sys|"
    "tel|tenn|thu|tue|univ|va|vt|wed|wisc?|wyo|[ej]d\\.d|ph\\.d"
)
_NUMBERED = "art|ca|fig|nos?|op|pp|prop"  # these keep it before a number
_TAG = (
    r"""<(?:[!?][a-z-][^>\n]*|[a-z][\w:.-]*(?: +[a-z][\w:.-]*(?:=(?:'[^'\n]*'|"[^"\n]*"))?)* */?|/[a-z][\w:.-]* *)>"""
)
# Words that, with a capital, tell that a sentence begins and that a single letter before it ended one.
_STARTS = (
    "about|according|additionally|after|an?|as|at|but|earlier|he|her|here|however|if|in|it|last|many|more|now|once|one|other|our|"
    "she|since|so|some|such|that|the|their|then|there|these|they|this|we|what|when|while|yet|you|m[rs]\\."
)
_NOT_IN_ADDRESS = r' \t\n\f\r"<>|(){}'

_THING = rf"(?:[dlo]{_APOSTROPHE}{_ALNUM})?{_ALNUM}+(?:[-_]{_ALNUM}+)*"
_LINKED = rf"[a-z0-9][a-z0-9.,\u00ad]*(?:-(?:{_ACRONYM}\.|[a-z0-9\u00ad]+))+"
_JOINED = r"(?-i:[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+)"


def _compiled(*rules: str) -> tuple[re.Pattern[str], ...]:
    """Rules: in a group of each what becomes a token; what it asks to follow counts for the longest match, as in the original."""
    return tuple(re.compile(rule, re.IGNORECASE) for rule in rules)


_ADDRESSES = _compiled(
    rf"({_TAG})",
    rf"(https?://[^{_NOT_IN_ADDRESS}]+[^{_NOT_IN_ADDRESS}.!?,-])",
    rf"((?:www\.(?:[^{_NOT_IN_ADDRESS}.!?,]+\.)+[a-z]{{2,4}}|(?:(?-i:[^{_NOT_IN_ADDRESS}.!?`',-_$])+\.)+(?:com|net|org|edu))"
    rf'(?:/[^ \t\n\f\r"<>|()]+[^{_NOT_IN_ADDRESS}.!?,-])?)',
    rf"((?:<|&lt;)?[a-z0-9][^{_NOT_IN_ADDRESS}\u00a0]*@(?:[^{_NOT_IN_ADDRESS}.\u00a0]+\.)*[^{_NOT_IN_ADDRESS}.\u00a0]+(?:>|&gt;)?)",
)
_DIVIDED = _compiled(  # as in Penn's treebank
    r"(c\+\+|c#|f#)|(can)not|(gon)na|(got)ta|(lem)me|(gim)me|(wan)na",
    rf"('t)(?:is|was)|(more){_APOSTROPHE}n",
    rf"([a-z]+)n{_APOSTROPHE}t",
    rf"(n{_APOSTROPHE}t)(?![a-z])",
    rf"({_WORD}){_APOSTROPHE}(?:[msd]|re|ve|ll)",
    r"((?:'|&apos;)(?:[msd]|re|ve|ll))(?![a-z])|([\u2019\u0092](?:[msd]|re|ve|ll))",
)
_WITH_APOSTROPHE = _compiled(
    rf"({_APOSTROPHE}(?:n{_APOSTROPHE}|n(?=[ \n])|em|cause|till?|[2-9]0s|\d\d(?=[ \n])))",
    rf"([dlj]{_APOSTROPHE}|y{_APOSTROPHE}(?={_LETTER})|(?-i:[A-HJ-XZn]){_APOSTROPHE}{_LETTER}{{2,}})",
    rf"({_LETTER}+[aeiouy]{_APOSTROPHE}(?-i:[aeiouA-Z]){_LETTER}*)",
    rf"(ol{_APOSTROPHE}|d{_APOSTROPHE}ye|o{_APOSTROPHE}o|dunkin{_APOSTROPHE}|somethin{_APOSTROPHE})",
    r"(c'mon|cont'd\.|e'er|ev'ry|li'l|nat'l|nor'easter|s'mores)",
    rf"({_THING})",
)
_REST = _compiled(
    rf"({_WORD})",
    rf"((?:{_ABBREVIATIONS})\.)[\s\S]{{2}}",
    rf"({_LINKED})",
    r"([a-z0-9]+(?:-[a-z]+){0,2}(?:\\?/[a-z0-9]+(?:-[a-z]+){0,2}){1,2})",
    rf"({_JOINED})",
    rf"({_PLAIN}+(?:\.{_PLAIN}+)*\.(?:{_ENDING}))(?=[ \t\n\u00a0.?!,])",
    rf"(@[a-z_][a-z_0-9]*|#{_LETTER}+)",
    # words with a full stop
    rf"((?:{_ACRONYM}|{_TITLES}|{_ABBREVIATIONS})\.)",
    rf"([a-z]\.)(?!(?-i:[ \n\u00a0]+(?:{_TAG}|(?=[A-Z])(?i:{_STARTS})[ \n])))",
    rf"((?:{_NUMBERED})\.)[ \n\u00a0]?\d",
    rf"((?:{_WORD}|{_THING}|{_JOINED}|{_LINKED})\.)[,;:]",
    # numbers
    r"(\d{1,2}[-/]\d{1,2}[-/]\d{2,4})",
    rf"([-+]?{_NUMBER})",
    r"((?:\d{1,4}[- \u00a0])?\d{1,4}(?:\\?/|\u2044)\d{1,4}|[\u00bc-\u00be\u2153-\u215e])",
    r"((?:\(\d{2,3}\)[ \u00a0]?|(?:\+\+?)?(?:\d{2,4}[- \u00a0])?\d{2,4}[- \u00a0])\d{3,4}[- \u00a0]?\d{3,5})",
    r"((?:(?:\+\+?)?\d{2,4}\.)?\d{2,4}\.\d{3,4}\.\d{3,5})",
    r"((?-i:[A-Z]*)\$|[\u00a2-\u00a5\u0080\u20a0\u20ac])",
    # signs
    r"([<>]?[:;=][-o*']?(?-i:[()DPdpO\\{@|\[\]]))(?![a-z0-9])|([-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\))",
    r"(&(?:md|mdash|ndash);|[\u0096\u0097\u2013-\u2015])|(&(?:amp|lt|gt|quot|#\d+);)",
    r"(\.{3,5}|(?:\.[ \u00a0]){2,4}\.)",
    r"([?!]+|-+|\*+|(?:\\\*){1,3}|#+|@+|_+|<<|>>|'')",
    "([`\u2018-\u201f\u00ab\u00bb\u0091-\u0094\u2039\u203a]{1,2})",
    rf"([{_SIGN}])",
)
_VERBATIM = {*_ADDRESSES, *_WITH_APOSTROPHE}  # their tokens keep the form of an apostrophe
_RULES = (*_ADDRESSES, *_DIVIDED, *_WITH_APOSTROPHE, *_REST)
# What most of a caption is made of: a word that no other rule could take, a comma, the full stop of a line.
_SIMPLE = re.compile(r"[A-Za-z]+(?=[ \n]|, )|[A-Za-z]{2,}(?=\.\n)|\.(?=\n)|,(?= )")
_NOT_SIMPLE = re.compile(rf"cannot|gonna|gotta|lemme|gimme|wanna|{_TITLES}|{_ABBREVIATIONS}|{_NUMBERED}")

_SPELLING = str.maketrans(
    {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "\u00ad": None, " ": "\u00a0"}
    | dict.fromkeys("\u2018\u201b\u0091\u2039", "`") | dict.fromkeys("\u2019\u0092\u203a", "'")
    | dict.fromkeys("\u201c\u0093\u00ab", "``") | dict.fromkeys("\u201d\u0094\u00bb", "''")
)  # fmt: skip
_SPELLED = {
    "&lt;": "<", "&gt;": ">", '"': "''", "&quot;": "''", "\u00a3": "#", "\u00a2": "cents", "\u00a4": "$", "\u0080": "$",
    "\u20a0": "$", "\u20ac": "$", "\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3", "\u0085": "...",
    "\u2026": "...", "&md;": "--", "&mdash;": "--", "&ndash;": "--", "\u0096": "--", "\u0097": "--", "\u2013": "--", "\u2014": "--",
    "\u2015": "--", "\u2010": "-", "\u2011": "-", "\u00ad": "-",
}  # fmt: skip


def tokenize(captions: Sequence[str]) -> list[str]:
    """Each caption as its words joined by single spaces, lower case, without punctuation; "" where nothing is left.

    The captions are scanned as the lines of one text, since the original looks across the end of a line (see above); a line
    break inside a caption is a space.
    """
    lines = [" ".join(re.split(r"[\n\r\u2028\u2029\x0b\x0c]|&nbsp;", caption)) for caption in captions]
    return [
        " ".join(word for word in words if word not in DROPPED)
        for words in _scan("".join(line + "\n" for line in lines))
    ]


def _scan(text: str) -> list[list[str]]:
    """All tokens of each line of a text; every line ends with a line break."""
    lines: list[list[str]] = []
    words: list[str] = []
    at = 0
    while at < len(text):
        if text[at] == "\n":
            lines.append(words)
            words = []
            at += 1
        elif (simple := _SIMPLE.match(text, at)) and _is_simple(word := simple[0].lower()):
            words.append(word)
            at = simple.end()
        elif text[at] != " " and (matches := [match for rule in _RULES if (match := rule.match(text, at))]):
            longest = max(matches, key=lambda match: match.end())  # the first of the longest
            token = longest[longest.lastindex or 0]
            words.append(token.lower().replace(" ", "\u00a0") if longest.re in _VERBATIM else _written(token))
            at += len(token)
        else:
            at += 1  # a space, or a character that the original does not know
    return lines


@cache
def _is_simple(word: str) -> bool:
    return not _NOT_SIMPLE.fullmatch(word)


def _written(token: str) -> str:
    """A token of the text as it is written out."""
    token = token.lower()
    if token in _SPELLED:
        return _SPELLED[token]
    if token in ("--", "---", "----"):
        return "--"
    if token[0] in ":;=" and token[-1] in "[]{":
        return token  # a face
    if token[0] == "." and len(token) > 1 and not token.strip(". \u00a0"):
        return "..."
    return token.replace("&apos;", "'").replace("&amp;", "&").translate(_SPELLING)
