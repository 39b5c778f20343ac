"""What LOOP's page, `loopfast.training.train`, is made of."""
