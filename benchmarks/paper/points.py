"""Results that are computed one by one and kept, so that a killed run goes on where it was."""

import json
import os

from tqdm import tqdm


class Points:
    """Values by name, in `points.json` of a folder; each is computed once.

    Args:
        folder: where they are kept.
        settings: what they depend on; points of other settings are refused.
        names: all that will be asked for.
    """

    def __init__(self, folder, settings, names):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.settings, self.values = folder / "points.json", settings, {}
        if self.path.exists():
            kept = json.loads(self.path.read_text())
            if kept["settings"] != settings:
                raise SystemExit(
                    f"{self.path} has the settings {kept['settings']}, not {settings}: "
                    "choose another --out, or delete it"
                )
            self.values = kept["values"]
        done = sum(name in self.values for name in names)
        self.bar = tqdm(total=len(names), initial=done, desc=folder.name)

    def __call__(self, name, make):
        """The value of that name, by `make()` if it is not there yet."""
        if name not in self.values:
            self.bar.set_postfix_str(name)
            self.values[name] = make()
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps({"settings": self.settings, "values": self.values}))
            os.replace(part, self.path)
            self.bar.update()
        return self.values[name]
