"""From an ``nn.Module`` to a graph of the contract; needs the extra ``curvd[torch]``.

In order: `capture` calls torch.export, `translate` walks what it found, with the
in-place operators made pure by `aliases` and some others replaced by `rewrites`,
`manifest` lists the tensors, and `tape` writes the message.
"""
