"""Part `sketch`: what sketching a response costs, by benchmarks/sketch_cost.py, in sequences a second."""

import argparse

from benchmarks.gpu.child import emit, forget_peak, parse, peak_bytes, require_out_of_memory

REPEATS = 3


def main() -> None:
    _, sizes = parse(__doc__)
    from sketch_cost import plain, sketch

    prompt, response, rows = sizes.rows
    case = argparse.Namespace(prompt=prompt, response=response, rows=rows, repeats=REPEATS)
    tokens = prompt + response
    base = {}
    for part in ("all", "last block"):
        forget_peak()
        base[part] = plain(case, sizes.sketched, part) * tokens
        speed = {"rows_per_second": 1 / base[part], "peak_bytes": peak_bytes()}
        emit("sketch", what="forward and backward", trainable=part, **speed)
    for part in ("all", "last block", "head"):
        forget_peak()
        try:
            seconds, width = sketch(case, sizes.sketched, part, sizes.k)
        except RuntimeError as error:
            require_out_of_memory(error)
            emit("sketch", what="sketch", trainable=part, fits=False)
            continue
        seconds *= tokens
        share = {"of_forward_and_backward": seconds / base["all"], "numbers": width}
        emit("sketch", what="sketch", trainable=part, rows_per_second=1 / seconds, **share, peak_bytes=peak_bytes())


if __name__ == "__main__":
    main()
