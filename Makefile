# make book   run every chapter and build the site; says where it is and what was found
# make test   exported code, notebooks, the book with warnings as errors, pytest
# make paper  the findings as a paper, book/_build/paper/paper.pdf, from the chapters' own cells; COLUMNS=1 for one column
# make book-pdf   the built book as one file, book/_build/book.pdf; needs Chromium
# make bench  race patch scans and the lens against TransformerLens, edge scores against auto-circuit, training against transformers.Trainer, autoencoders against sae-lens (25 minutes; on a quiet machine they are written to results/benchmarks)
# make serve  the built site at http://localhost:$(PORT)
# make clean  remove what was built; `make distclean` removes .venv too
#
# Each sets itself up in .venv. On Linux the plain torch package brings several gigabytes of CUDA libraries; for the small
# processor-only build:  make book TORCH_INDEX=https://download.pytorch.org/whl/cpu

.DELETE_ON_ERROR:
.PHONY: book test test-notebooks test-pages paper book-pdf bench clean distclean serve constraints

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)
TORCH_INDEX ?=
PORT ?= 8000
COLUMNS = 2
BIN := .venv/bin
SITE := book/_build/html
ENV := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYDEVD_DISABLE_FILE_VALIDATION=1 PATH="$(CURDIR)/$(BIN):$$PATH"
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
BUILD := $(ENV) jupyter-book build . --toc _toc.yml --config book/_config.yml --path-output book --all -W -n --keep-going -q

.venv/.ready: constraints.txt settings.ini setup.py pyproject.toml
	@test -n "$(PYTHON)" || { echo "needs Python 3.11, 3.12 or 3.13: install one, or name it with make PYTHON=..."; exit 2; }
	@echo "setting up .venv with $(PYTHON) (a few minutes, once)"
	@$(PYTHON) -m venv .venv || { echo "python has no venv module: install it (Debian, Ubuntu: apt-get install python3-venv)"; exit 2; }
	@$(PIP) setuptools wheel
	@$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

book: .venv/.ready
	@$(BUILD)
	@echo; echo "The book: $(CURDIR)/$(SITE)/index.html"
	@if [ -f mechinterp_lib/cli.py ]; then echo; $(ENV) mechinterp report; fi

test: .venv/.ready
	@echo "1 of 2: every notebook's own tests, and beside them the book, warnings as errors"
	@$(MAKE) --no-print-directory --jobs 2 test-notebooks test-pages
	@echo "2 of 2: pytest"
	@$(ENV) MECHINTERP_NEEDS_BOOK=1 OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile

test-notebooks: .venv/.ready
	@$(ENV) OMP_NUM_THREADS=1 nbdev_test --n_workers 1

test-pages: .venv/.ready
	@$(ENV) OMP_NUM_THREADS=1 $(BUILD)

paper: .venv/.ready
	@$(ENV) python book/_ext/paper.py --columns $(COLUMNS)

book-pdf: .venv/.ready
	@$(ENV) python book/_ext/print_book.py

bench: .venv/.ready
	@$(ENV) mechinterp bench patching lens training sae
	@if $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps auto-circuit==1.0.1 ordered-set==4.1.0; \
	 then $(ENV) mechinterp bench circuit; else echo "auto-circuit cannot be installed here: edge scores were not raced"; fi

serve:
	@test -f $(SITE)/index.html || { echo "no book yet: run make book"; exit 2; }
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory $(SITE) $(PORT)

# Pins written by uv's resolver from settings.ini, one file for Python 3.11 to 3.13 on every system.
constraints: .venv/.ready
	@$(BIN)/python -m pip install --quiet uv
	@$(BIN)/uv pip compile setup.py --extra dev --universal --python-version 3.11 --fork-strategy fewest --upgrade \
	  --no-annotate --no-emit-index-url --no-emit-find-links --custom-compile-command "make constraints" --output-file constraints.txt

clean:
	rm -rf book/_build reference build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
