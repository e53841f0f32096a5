"""AdamP and SGDP for Keras 3, on the TensorFlow, JAX and torch backends.

```python
model.compile(adamp_tf.AdamP(1e-3, weight_decay=1e-2, layouts=adamp_tf.layouts_for(model)), loss="mse")
```
"""

from adamp_tf._adamp import AdamP
from adamp_tf._layouts import describe, layouts_for
from adamp_tf._sgdp import SGDP
from adamp_tf._snapshot import load_snapshot, save_snapshot

__all__ = ["SGDP", "AdamP", "describe", "layouts_for", "load_snapshot", "save_snapshot"]
