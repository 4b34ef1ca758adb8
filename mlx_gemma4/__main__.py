"""`python -m mlx_gemma4`: the command line."""

from .cli.main import main

if __name__ == "__main__":
    main(prog_name="mlx-gemma4")
