"""A grid's axes and scores, read back as TensorBoard's own tab HParams reads them."""

import pytest
import yaml
from tensorboard import context
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups

from dsdistill.compare.grid import make_grid, read_grid
from dsdistill.compare.hparams import write_hparams
from tests.compare.fake import KINDS, results_of


@pytest.fixture
def grid(tmp_path):
    axes = {"objective": ["att_kl", "kd"], "task": ["cola", "rte"], "seed": [0]}
    content = {"name": "g", "source": "what it repeats", "output": str(tmp_path / "grid"), "axes": axes}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return make_grid(read_grid(tmp_path / "grid.yaml"), (), KINDS)


def shown(directory):
    """The experiment, and of each cell its axes, its scores and its status, as the plugin sees them."""
    runs = plugin_event_multiplexer.EventMultiplexer()
    runs.AddRunsFromDirectory(str(directory))
    runs.Reload()
    provider = data_provider.MultiplexerDataProvider(runs, str(directory))
    request, plugin = context.RequestContext(), backend_context.Context(base_plugin.TBContext(data_provider=provider))
    statuses = [api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE]
    experiment = get_experiment.Handler(request, plugin, "", api_pb2.GetExperimentRequest()).run()
    wanted = api_pb2.ListSessionGroupsRequest(allowed_statuses=statuses, start_index=0, slice_size=100)
    found = list_session_groups.Handler(request, plugin, "", wanted).run()
    cells = {}
    for group in found.session_groups:
        scores = {value.name.tag: value.value for value in group.metric_values}
        axes = {axis: value.string_value for axis, value in group.hparams.items()}
        cells[group.name] = axes, scores, group.sessions[0].status
    return experiment, cells


def test_tensorboard_shows_axes_and_scores_of_every_cell(grid):
    lines = [
        {"cell": cell.id, "axes": dict(cell.axes), "status": "done", **results_of(cell.recipe)} for cell in grid.cells
    ]
    failed = {"cell": lines[-1]["cell"], "axes": lines[-1]["axes"], "status": "failed", "error": "it broke"}
    for told in (lines, [*lines[:-1], failed]):  # the second time nothing of the first is left
        directory = write_hparams(grid.settings.output, grid.settings, told)
        experiment, cells = shown(directory)
        assert directory == grid.settings.output / "hparams"
        assert sorted(info.name for info in experiment.hparam_infos) == ["objective", "seed", "task"]
        assert [v.string_value for v in experiment.hparam_infos[0].domain_discrete.values] == ["att_kl", "kd"]
        assert experiment.metric_infos[0].name.tag == "score/primary"
        assert list(cells) == [line["cell"] for line in told]
        for line in told:
            axes, scores, status = cells[line["cell"]]
            assert axes == line["axes"]
            if line["status"] == "failed":
                assert (scores, status) == ({}, api_pb2.STATUS_FAILURE)
                continue
            assert status == api_pb2.STATUS_SUCCESS
            name = "matthews" if axes["task"] == "cola" else "accuracy"
            assert scores["score/primary"] == pytest.approx(100 * line["scores"]["dev"][name])
            assert scores["score/dev_other/accuracy"] == pytest.approx(0.1)
            assert scores["training/seconds"] == 2.5
