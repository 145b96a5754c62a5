"""The command `lazyneuron`: the runtime's, the converter's and the predictors' command lines as one program."""
