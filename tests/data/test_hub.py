import pytest

from lossmith.data import hub, read_corpus
from lossmith.errors import InputError


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(hub, "hub_is_reachable", lambda: True)


@pytest.mark.parametrize(
    "source, expected",
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:small", ("owner/name", "small", "train")),
        ("owner/name:small:test[:10%]", ("owner/name", "small", "test[:10%]")),
        ("owner/name::validation", ("owner/name", None, "validation")),
    ],
)
def test_a_hub_id_is_streamed_with_its_config_and_split(monkeypatch, online, source, expected):
    import datasets

    asked = []

    def load_dataset(name, config, *, split, streaming):
        assert streaming
        asked.append((name, config, split))
        rows = {"text": ["one", None, "two"], "kind": ["a", "b", "a"]}
        return datasets.Dataset.from_dict(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = [(d.text, d.domain, d.source) for d in read_corpus(source, domain_field="kind")]
    assert found == [("one", "a", f"{source}, row 1"), ("two", "a", f"{source}, row 3")]
    assert asked == [expected]


def test_without_network_the_sentence_says_both_that_there_is_no_path_and_no_hub(monkeypatch):
    monkeypatch.setattr(hub, "hub_is_reachable", lambda: False)
    with pytest.raises(InputError, match="no file or folder 'owner/name', and the Hugging Face hub cannot be"):
        list(read_corpus("owner/name"))


def test_offline_mode_asks_nobody(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("no connection may be opened")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("socket.create_connection", refuse)
    hub.hub_is_reachable.cache_clear()
    assert not hub.hub_is_reachable()
    hub.hub_is_reachable.cache_clear()


def test_an_unreachable_host_is_noticed(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    hub.hub_is_reachable.cache_clear()
    assert not hub.hub_is_reachable()
    hub.hub_is_reachable.cache_clear()


def test_a_dataset_that_does_not_exist_is_one_sentence(monkeypatch, online):
    import datasets

    def load_dataset(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("no such data set\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError) as caught:
        list(read_corpus("owner/name"))
    assert "DatasetNotFoundError: no such data set" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_connection_lost_on_the_way_names_the_row(monkeypatch, online):
    import datasets

    def rows(*args, **kwargs):
        yield {"text": "one"}
        raise ConnectionError("lost")

    monkeypatch.setattr(datasets, "load_dataset", rows)
    with pytest.raises(InputError, match="owner/name, row 2: cannot be read from the hub"):
        list(read_corpus("owner/name"))


def test_a_missing_text_field_names_those_that_are_there(monkeypatch, online):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: iter([{"content": "x"}]))
    with pytest.raises(InputError, match=r"owner/name, row 1: there is no field 'text' .* only: content"):
        list(read_corpus("owner/name"))
