"""lm-eval's prompt templates in a sandbox: a template of a task file reaches its row and nothing of Python."""

import functools

import lm_eval.utils
from jinja2.sandbox import SandboxedEnvironment


@functools.cache
def use_sandbox() -> None:
    """Let lm-eval write every prompt of this process in a sandbox; what its own templates write is the same.

    Each template is compiled once: lm-eval asks for the same few again for every row.
    """
    plain = lm_eval.utils.env
    sandbox = SandboxedEnvironment(
        loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=plain.keep_trailing_newline
    )
    sandbox.filters.update(plain.filters)
    vars(sandbox)["from_string"] = functools.lru_cache(maxsize=1024)(sandbox.from_string)
    lm_eval.utils.env = sandbox
