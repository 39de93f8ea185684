if __name__ == "__main__":
    from blip import signals

    signals.hold()  # what Slurm says while libraries are imported waits for the run

    from blip.main import main

    main()
