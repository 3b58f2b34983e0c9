"""Local attention for decoder-only models, as a plugin that vLLM loads in every process.

``entry``    what vLLM calls; imports nothing heavy, refuses the wrong vLLM
``plan``     from configuration to one rule a layer; pure, needs neither vLLM nor torch
``hooks``    where the plan takes hold of vLLM
``layers``   an attention layer's kind, backend and KV-cache spec
``rows``     chunked attention as virtual rows of a batch
``sinks``    the KV cache and the kernels that keep the first tokens visible
``audit``    after loading: every layer is what the plan says, or the engine stops
"""
