"""MiniMonkey as a package, for scripts, tests and programs that import its parts.

    from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration
    from minimonkey.processing_minimonkey import MiniMonkeyProcessor

The Auto classes of transformers load the same files as remote code and do not look at this one.
"""
