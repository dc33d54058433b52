"""The ops: importing this package registers every `torch.ops.cellops.*`. One file per op."""
