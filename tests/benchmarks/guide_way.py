"""The way of Ray's own guide: a Ray Data pipeline handed to TorchTrainer, batches by `iter_torch_batches`.

Written as its documentation teaches, with one change: the workers reserve half a CPU each, because on a machine with
as many CPUs as workers no data task would ever be placed.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from measure import Clock, process_start_s, training_arguments


def main() -> None:
    """Train, and print the JSON object on stdout."""
    parser = training_arguments(__doc__ or "")
    parser.add_argument("--shuffle-buffer-rows", type=int, default=1000, help="rows that are shuffled together")
    options = parser.parse_args()
    start_s = process_start_s()

    import ray.data
    import ray.train
    from ray.train.torch import TorchTrainer

    with tempfile.TemporaryDirectory(prefix="guide-") as folder:
        dataset = ray.data.read_parquet(str(options.data.resolve() / "train")).map_batches(normalise)
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={
                "epochs": options.epochs,
                "batch_rows": options.global_batch_rows // options.workers,
                "shuffle_buffer_rows": options.shuffle_buffer_rows,
                "width": options.width,
                "start_s": start_s,
                "result": f"{folder}/result.json",
                "checkpoint_every_steps": options.checkpoint_every_steps,
            },
            scaling_config=ray.train.ScalingConfig(num_workers=options.workers, resources_per_worker={"CPU": 0.5}),
            run_config=ray.train.RunConfig(
                storage_path=folder,
                failure_config=ray.train.FailureConfig(max_failures=3 if options.checkpoint_every_steps else 0),
            ),
            datasets={"train": dataset},
        )
        trainer.fit()
        print(json.dumps(json.loads(Path(folder, "result.json").read_text())))


def normalise(batch: dict[str, Any]) -> dict[str, Any]:
    """Bytes of 28x28 grey pixels -> float32 [n, 1, 28, 28] in 0..1."""
    import numpy as np

    pixels = np.stack([np.frombuffer(image, np.uint8) for image in batch["image"]])
    return {"image": pixels.reshape(-1, 1, 28, 28).astype(np.float32) / 255, "label": batch["label"]}


def train_worker(config: dict[str, Any]) -> None:
    """What each worker runs."""
    import ray.train
    import torch
    from ray.train.torch import prepare_model

    from jobs.mnist.model import Cnn

    torch.set_num_threads(1)
    torch.manual_seed(0)
    world_size = ray.train.get_context().get_world_size()
    model = prepare_model(Cnn(width=config["width"], num_classes=10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    shard = ray.train.get_dataset_shard("train")
    clock = Clock(config["start_s"])
    first_epoch = steps = 0
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as saved_in:
            saved = torch.load(Path(saved_in, "state.pt"), weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first_epoch = saved["epoch"]
    for epoch in range(first_epoch, config["epochs"]):
        for batch in shard.iter_torch_batches(
            batch_size=config["batch_rows"], local_shuffle_buffer_size=config["shuffle_buffer_rows"]
        ):
            loss = torch.nn.functional.cross_entropy(model(batch["image"]), batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            clock.step(epoch, len(batch["label"]) * world_size)
            steps += 1
            if config["checkpoint_every_steps"] and steps % config["checkpoint_every_steps"] == 0:
                report_checkpoint(model, optimizer, epoch)
        ray.train.report({"loss": loss.item()})
    if ray.train.get_context().get_world_rank() == 0:
        Path(config["result"]).write_text(json.dumps({**clock.result(), "loss": loss.item()}))


def report_checkpoint(model: Any, optimizer: Any, epoch: int) -> None:
    """Hand a checkpoint of rank 0 to Ray Train, as its guide to fault tolerance does."""
    import ray.train
    import torch

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if ray.train.get_context().get_world_rank() == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
            torch.save(state, Path(folder, "state.pt"))
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({}, checkpoint=checkpoint)


if __name__ == "__main__":
    main()
