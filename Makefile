.PHONY: setup check full docs quickstart
setup:
	bash scripts/test.sh --install_only
check:
	bash scripts/test.sh
full:
	bash scripts/test.sh --full
quickstart:
	bash scripts/test.sh --quickstart
docs:
	.venv/bin/python -m pytest -q -s -m "not slow" tests/docs
