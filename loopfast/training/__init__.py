"""The parts of LOOP's page, `loopfast.training.train`."""
