"""The numbers of metrics.jsonl for TensorBoard (`train.py --enable_tensorboard`): step/loss, step/lr, eval/accuracy and so on."""

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:
    raise ValueError("--enable_tensorboard: needs `pip install tensorboard`") from None


class Writer:
    """Writes events of metrics.jsonl into a directory, to go on after step `done`: what stands there of later steps is hidden."""

    def __init__(self, directory: str, done: int = 0):
        try:
            self.writer = SummaryWriter(directory, purge_step=done + 1 if done else None)
        except OSError as error:
            raise ValueError(f"--tensorboard_path {directory}: cannot be written to ({error.strerror}); give another directory") from None

    def write(self, event: dict):
        """event: a line of metrics.jsonl; its numbers become scalars of its step. Those that were not finite are left out."""
        for name, value in event.items():
            if name not in ("event", "step") and value is not None:
                self.writer.add_scalar(f"{event['event']}/{name}", value, event["step"])
        self.writer.flush()
