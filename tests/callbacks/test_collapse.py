import pytest
from pytorch_lightning.loggers import CSVLogger

from lightning_dp.callbacks import NeuralCollapse
from lightning_dp.methods.neuromix import neural_collapse
from tests.methods.runs import make_data
from tests.methods.test_neuromix import fit, make


@pytest.mark.parametrize("public", [10, 0])
def test_measures_are_those_of_the_public_records_alone(tmp_path, public):
    module = make()
    logger = CSVLogger(tmp_path, name=None, version="v")
    data = make_data(module.privacy, public_per_class=public, audit=200 if public == 0 else 100)
    fit(tmp_path, module, data, callbacks=[NeuralCollapse()], logger=logger)
    written = tmp_path / "v" / "metrics.csv"
    if not public:
        assert not written.exists() or "nc1" not in written.read_text()
        return
    records = data.role("public")
    nc1, distance = neural_collapse(module.net.features(data.normalize(records.images)).detach(), records.labels)
    header, row, *_ = written.read_text().splitlines()
    found = dict(zip(header.split(","), row.split(","), strict=True))
    assert float(found["public/nc1"]) == pytest.approx(nc1, rel=1e-5)
    assert float(found["public/class_distance"]) == pytest.approx(distance, rel=1e-5)
