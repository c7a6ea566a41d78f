"""The functional model that `MobileNetV2` gives: shown layer by layer, run as blocks."""

import math
import operator
import warnings
from typing import Any

import keras

from keras_mnv2 import ops
from keras_mnv2.annotations import Tensor
from keras_mnv2.layers.fusing import Plan


# Named as version 0.1.0 has it in its files.
@keras.saving.register_keras_serializable("keras_mnv2", name="Network")
class MobileNetV2Model(keras.Model):
    """A functional model that runs as a whole where nobody looks inside.

    Called as a whole, it computes units of convolution, batch norm and activation in one go, from the variables and
    settings that its layers have at that time. With a hook on a layer, a layer whose `call` was replaced, or a
    distribution of Keras, it runs layer by layer; so do models that are built around its tensors. In inference it runs
    for some images at a time where `ops` finds that faster.
    """

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        def run(x: Tensor) -> Any:
            plan = self._plan_of_now()
            if plan is None or mask is not None or len(x.shape) != len(self.inputs[0].shape):
                return super(MobileNetV2Model, self).call(x, training=training, mask=mask)
            x = keras.ops.convert_to_tensor(x, dtype=self.inputs[0].dtype)
            compute = ops.compiled(plan, x) if self.compiled and self.jit_compile else plan
            found = keras.tree.pack_sequence_as(self.output, compute(x, training))
            return found[0] if isinstance(found, list) and len(found) == 1 else found

        if not hasattr(inputs, "shape"):
            return super().call(inputs, training=training, mask=mask)
        if training or mask is not None or None in inputs.shape[1:]:
            return run(inputs)
        # At alpha 1.0 the widest tensor, the expansion of block_1, has eight times the numbers of the image.
        return ops.network_in_chunks(run, inputs, 8 * math.prod(inputs.shape[1:]))

    def train_step(self, *args: Any, **kwargs: Any) -> Any:
        """As Keras's; on PyTorch the list of weights, which a step asks for several times, is made once."""
        if keras.backend.backend() != "torch":
            return super().train_step(*args, **kwargs)
        # Not as an attribute, whose variables Keras would take for others.
        self.__dict__["_weights_of_step"] = super().trainable_weights
        try:
            return super().train_step(*args, **kwargs)
        finally:
            self.__dict__.pop("_weights_of_step", None)

    def _should_torch_compile(self) -> bool:
        if not super()._should_torch_compile():
            return False
        if self._plan_of_now() is not None:
            # The network is compiled as one graph (see `call`). Keras would have all that a step does traced, down to
            # how it counts its losses: minutes, in dozens of graphs.
            return False
        if self._plan is None:
            return True
        warnings.warn(
            "jit_compile=True has no effect while somebody watches a layer of the model or has replaced its call.",
            stacklevel=2,
        )
        return False

    @property
    def trainable_weights(self) -> list[keras.Variable]:
        """As in `keras.Model`."""
        found = self.__dict__.get("_weights_of_step")
        return super().trainable_weights if found is None else found

    def _track_variables(self) -> None:
        # `train_on_batch` would have PyTorch's parameters collected anew at each call.
        variables = self.variables
        known = self.__dict__.get("_tracked_variables", ())
        if len(known) != len(variables) or not all(map(operator.is_, known, variables)):
            super()._track_variables()
            self.__dict__["_tracked_variables"] = variables

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As `keras.Model.predict`; a dict of outputs keeps its order, which some backends sort."""
        found = super().predict(*args, **kwargs)
        return {name: found[name] for name in self.output} if isinstance(self.output, dict) else found

    def _plan_of_now(self) -> Plan | None:
        """How to run it as a whole, or None where it must run layer by layer."""
        if not hasattr(self, "_plan"):
            self._plan = Plan.read(self)
        return self._plan if self._plan is not None and self._plan.may_run() else None


# Keras's `.h5` files of whole models have the class alone, without the package that it is registered by.
keras.saving.get_custom_objects()[MobileNetV2Model.__name__] = MobileNetV2Model
