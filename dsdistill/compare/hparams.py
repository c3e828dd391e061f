"""A grid as TensorBoard's tab HParams shows it: axes and scores of every cell, to be sorted, filtered and plotted."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto import summary_pb2
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

from dsdistill.compare.grid import GridSettings
from dsdistill.compare.results import DONE, Line
from dsdistill.compare.scores import primary
from dsdistill.training.telemetry import tensorboard_writer

DIRECTORY = "hparams"
PRIMARY = "score/primary"
_API: Any = api_pb2  # protobuf makes what is in these modules when they are imported
_DATA: Any = plugin_data_pb2
_SUMMARY: Any = summary_pb2


def write_hparams(output: Path, settings: GridSettings, lines: Sequence[Line]) -> Path:
    """Write the grid anew: what there is to know of it, and a folder for each cell that has ended.

    Args:
        output: The grid's directory.
        settings: Names the axes and their labels.
        lines: Of the results file.

    Returns:
        What was written.
    """
    directory = output / DIRECTORY
    shutil.rmtree(directory, ignore_errors=True)
    numbers = {line["cell"]: numbers_of(line) for line in lines if line["status"] == DONE}
    tags = dict.fromkeys(tag for told in numbers.values() for tag in told)
    _write(directory, [_summary(metadata.EXPERIMENT_TAG, experiment=_experiment(settings, [*tags]))], {})
    for line in lines:
        start = _DATA.SessionStartInfo(group_name=line["cell"])
        for axis, label in line["axes"].items():
            start.hparams[axis].string_value = label
        status = "STATUS_SUCCESS" if line["status"] == DONE else "STATUS_FAILURE"
        end = _DATA.SessionEndInfo(status=_API.Status.Value(status))
        both = [
            _summary(metadata.SESSION_START_INFO_TAG, session_start_info=start),
            _summary(metadata.SESSION_END_INFO_TAG, session_end_info=end),
        ]
        _write(directory / line["cell"], both, numbers.get(line["cell"], {}))
    return directory


def numbers_of(line: Line) -> dict[str, float]:
    """Scores of a finished cell by tag: the primary one times 100, and all of each split."""
    told = {PRIMARY: primary(line["scores"], line)}
    for split, scores in line["scores"].items():
        told |= {f"score/{split}/{metric}": value for metric, value in scores.items()}
    return told | {"training/seconds": line["training"]["seconds"]}


def _experiment(settings: GridSettings, tags: Sequence[str]) -> Any:
    axes = []
    for axis in settings.axes:
        axes.append(_API.HParamInfo(name=axis, type=_API.DataType.Value("DATA_TYPE_STRING")))
        for label in settings.labels(axis):
            axes[-1].domain_discrete.values.add(string_value=label)
    metrics = [
        _API.MetricInfo(name=_API.MetricName(tag=tag), display_name=tag.removeprefix("score/").replace("/", " "))
        for tag in tags
    ]
    return _API.Experiment(name=settings.name, description=settings.source, hparam_infos=axes, metric_infos=metrics)


def _summary(tag: str, **content: Any) -> Any:
    data = _DATA.HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, **content)
    plugin = _SUMMARY.SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=data.SerializeToString())
    value = _SUMMARY.Summary.Value(tag=tag, metadata=_SUMMARY.SummaryMetadata(plugin_data=plugin))
    return _SUMMARY.Summary(value=[value])


def _write(directory: Path, summaries: Sequence[Any], scalars: dict[str, float]) -> None:
    writer = tensorboard_writer(directory, first_step=0)
    for summary in summaries:
        writer._get_file_writer().add_summary(summary)
    for tag, value in scalars.items():
        writer.add_scalar(tag, value, 0)
    writer.close()
