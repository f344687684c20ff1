"""The numbers of metrics.jsonl for TensorBoard (`train.py --enable_tensorboard`): step/loss, step/lr, eval/accuracy and so on."""

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:
    raise ValueError("--enable_tensorboard: needs `pip install tensorboard`") from None


class Writer:
    """Writes events of metrics.jsonl into a directory, to go on after step `done`: what stands there of later steps, or of
    an earlier run, is hidden."""

    def __init__(self, directory: str, done: int = 0):
        try:
            self.writer = SummaryWriter(directory, purge_step=done + 1 if done else 0)
        except OSError as error:
            raise unwritable(directory, error) from None

    def write(self, event: dict):
        """event: a line of metrics.jsonl; its numbers become scalars of its step. Those that were not finite are left out."""
        try:
            for name, value in event.items():
                if name not in ("event", "step") and value is not None:
                    self.writer.add_scalar(f"{event['event']}/{name}", value, event["step"])
            self.writer.flush()
        except OSError as error:
            raise unwritable(self.writer.log_dir, error) from None


def unwritable(directory, error: OSError) -> ValueError:
    return ValueError(
        f"--tensorboard_path {directory}: cannot be written to ({error.strerror}); give another directory"
    )
