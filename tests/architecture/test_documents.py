"""The checker of the documents notices what it is there for (`make docs` runs it)."""

import importlib.util

import pytest

from tests.architecture.tree import ROOT


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("check", ROOT / "docs/check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links(check, tmp_path):
    (tmp_path / "other.md").write_text("# Why two?\n")
    document = tmp_path / "document.md"
    document.write_text(
        "## Here\n[a](other.md) [b](other.md#why-two) [c](#here) [d](https://e.org/f)\n"
        "```\n[code](nowhere.md)\n```\n[e](missing.md) [f](other.md#why-three)\n"
    )
    assert list(check.broken_links(document)) == [
        "the link missing.md leads to no file",
        "the link other.md#why-three leads to no heading",
    ]


@pytest.mark.parametrize(
    "name, exists",
    [
        ("llama_jax.config.LlamaConfig.llama2_7b", True),
        ("llama_jax.config.LlamaConfig.rope_theta", True),
        ("llama_jax.config.LlamaConfig.rope_beta", False),
        ("llama_jax.nothing", False),
        ("nothing", False),
    ],
)
def test_symbols(check, name, exists):
    assert check.is_symbol(name) is exists


def test_paper_map(check, tmp_path):
    header = "| Claim | Symbol | Test |\n|---|---|---|\n"
    symbol = "`llama_jax.config.LlamaConfig`"
    test = "`tests/architecture/test_documents.py::test_paper_map`"
    paper_map = tmp_path / "paper_map.md"

    def faults(*rows: str) -> list[str]:
        paper_map.write_text(header + "\n".join(rows))
        return list(check.false_rows(paper_map))

    assert list(check.false_rows(paper_map)) == ["the file is missing"]
    assert faults() == ["it has no row `claim | symbol | test`"]
    assert faults(f"| section 2.2 | {symbol} | {test} |") == []
    assert faults(f"| section 2.2 | LlamaConfig | {test} |") == [
        "line 3 names no symbol"
    ]
    assert faults(f"| section 2.2 | {symbol} | `tests/test_no.py::test_a` |") == [
        "line 3: there is no test tests/test_no.py::test_a"
    ]
    assert faults(f"| section 2.2 | {symbol} | {test[:-1]}_two` |") != []
