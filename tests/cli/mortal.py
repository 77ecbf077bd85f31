"""The command line, in which training is killed by SIGKILL after the checkpoint of LOSSMITH_TEST_DIE_AT_STEP."""

import os
import signal
import sys

import transformers

import lossmith.training.trainer as trainer

STEP = int(os.environ["LOSSMITH_TEST_DIE_AT_STEP"])


class Death(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == STEP + 1:
            os.kill(os.getpid(), signal.SIGKILL)


original = trainer.Trainer.__init__


def mortal(self, *args, **kwargs):
    original(self, *args, **kwargs)
    self.add_callback(Death())


trainer.Trainer.__init__ = mortal

if __name__ == "__main__":
    from lossmith.cli import main

    if "--processes" in sys.argv and "WORLD_SIZE" not in os.environ:
        place = sys.argv.index("--processes")
        number = sys.argv[place + 1]
        if number != "1":
            del sys.argv[place : place + 2]
            launcher = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={number}",
            ]
            os.execv(sys.executable, [*launcher, __file__, *sys.argv[1:]])
    main()
