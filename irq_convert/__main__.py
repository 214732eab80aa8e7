"""`python -m irq_convert` is `irq-convert`."""

from irq_convert.cli.main import main

if __name__ == "__main__":
    main()
