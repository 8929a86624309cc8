"""What looks like a secret, and texts without it: one list for configs that are shown, errors that are passed on, and texts that are kept.

- `hide_keys` takes out what is a key by its form, wherever it stands: those of providers, code hosts and clouds, bearer tokens, JWTs,
  private keys, webhooks that let in whoever has the address.
- `hide_passwords` takes out those of URLs. A user without a password stays where databases let such in; elsewhere it is the secret.
- `hide_settings` takes out values whose names say that they are secret: ``password=...``, ``AccountKey=...``.
- `is_secret_name` says so of a name.
"""

import re

HIDDEN = "***"

# What makes a token: letters, digits and what stands between them; a star is what others have left of it.
_SIGN = r"[A-Za-z0-9_*.-]"
_KEYS = re.compile(
    "|".join(
        (
            r"\b(?i:bearer|basic)\s+[A-Za-z0-9._~+/=*-]{8,}",
            # OpenAI and its like, Stripe, xAI, Groq, GitHub, GitLab, Hugging Face, Slack, Google, AWS, npm, Replicate, Perplexity.
            rf"\b(?:sk|pk|rk|xai|gsk|AIza|pplx)[-_]{_SIGN}{{8,}}",
            r"\bAIza[A-Za-z0-9_-]{20,}",
            rf"\b(?:gh[pousr]|github_pat|hf|npm|r8|glpat|xox[a-z]|xapp)[-_]{_SIGN}{{8,}}",
            r"\b(?:AKIA|ASIA|AROA)[A-Z0-9]{12,}",
            r"\bya29\.[A-Za-z0-9_-]{8,}",
            # Words of this form have no digits.
            rf"\bkey[-_](?={_SIGN}{{0,40}}\d){_SIGN}{{8,}}",
            r"(?<![\w-])eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*)?",
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
            r"(?<=hooks\.slack\.com/services/)\S+",
            r"(?<=discord\.com/api/webhooks/)\S+",
            r"(?<=webhook\.office\.com/webhookb2/)\S+",
        )
    ),
    re.S,
)

# The last word of a name says it, so that max_tokens and key_env are none.
_WORDS = r"(?:\w*pass(?:word|wd|phrase)?|pwd|secrets?|tokens?|keys?|api_?keys?|credentials?|auth(?:orization)?|cookie|signature|sig)"
_CAMEL = r"(?:[A-Za-z0-9]*[a-z0-9])?(?:Password|Passwd|Passphrase|Pwd|Secret|Token|Key|Credential|Signature|Sig|Cookie|Auth)s?"
_NAME = re.compile(rf"(?:.*[_\-.])?(?i:{_WORDS})|(?:.*[_\-.])?{_CAMEL}", re.S)
_SURE = re.compile(
    r"(?:.*[_\-.])?(?i:(?:\w*pass(?:word|wd|phrase)|pwd|secret)s?)|(?:.*[_\-.])?[A-Za-z0-9]*[a-z0-9](?:Password|Secret)s?",
    re.S,
)
_SETTING = re.compile(
    rf"(?P<name>\b(?:(?i:(?:[\w.-]*[_.-])?{_WORDS})|(?:[\w.-]*[_.-])?{_CAMEL})\b\s*[=:]\s*)"
    r"(?P<value>\"[^\"]*\"|'[^']*'|[^&;,\s]+)"
)

# In a text, all with bounds: of 100,000 signs, however they are put, each is looked at but a few times.
_IN_TEXT = re.compile(r"\b[a-z][a-z0-9+.-]{0,20}://[^:/\s@]{0,100}:(?P<password>[^/\s@]{1,200})@", re.I)

# Of a URL: a password may hold any sign but the last @ before the host, also those that should have been escaped.
_PASSWORD = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)(?P<user>[^:/\s]*):(?P<password>.*)@", re.I | re.S)
_USER_ALONE = re.compile(
    r"(?P<scheme>\b(?!postgres|mysql|mariadb|mssql|oracle|ssh)[a-z][a-z0-9+.-]{0,20}://)[^:/?#\s@]{1,200}@", re.I
)


def is_secret_name(name: str) -> bool:
    """Whether a field of this name may hold a secret: ``api_key``, ``clientSecret``, ``x-token``."""
    return _NAME.fullmatch(name) is not None


def is_surely_secret_name(name: str) -> bool:
    """Whether it holds nothing else, not even as a number: ``password``, ``clientSecret``."""
    return _SURE.fullmatch(name) is not None


def hide_keys(text: str, mark: str = HIDDEN) -> str:
    """The text with ``mark`` in place of whatever is a key by its form."""
    return _KEYS.sub(mark, text)


def hide_passwords(text: str, mark: str = HIDDEN, *, is_url: bool = False) -> str:
    """The text with ``mark`` in place of passwords within URLs.

    Args:
        text: anything.
        mark: see above.
        is_url: it is one, or little more: what belongs to a password is seen from its end, whatever signs are in it.
    """
    if is_url:
        text = _PASSWORD.sub(rf"\g<scheme>\g<user>:{mark}@", text)
    else:
        text = _IN_TEXT.sub(lambda found: found[0].replace(f":{found['password']}@", f":{mark}@"), text)
    return _USER_ALONE.sub(rf"\g<scheme>{mark}@", text)


def hide_settings(text: str, mark: str = HIDDEN) -> str:
    """The text with ``mark`` in place of values whose names say that they are secret."""
    return _SETTING.sub(rf"\g<name>{mark}", text)
