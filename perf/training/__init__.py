"""Train torch.nn.RNN and tritonrnn.RNN side by side on the same batches."""
