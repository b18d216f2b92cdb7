"""The decorator of what ``torch.compile`` is to leave alone."""

from torch._compile import _disable_dynamo

# Private: `torch.compiler.disable` imports torch._dynamo at once, so that importing this package
# would take 2 s, and 16 s on a busy machine, in place of 0.3 s. This does so in the first call.
untraced = _disable_dynamo
