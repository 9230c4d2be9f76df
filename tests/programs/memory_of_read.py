"""Read an image; prints its shape or the error, then the megabytes of memory it took.

memory_of_read IMAGE
"""

import resource
import sys

from beingvl.errors import InputError
from beingvl.images.decode import read_image
from beingvl.images.preprocess import Preprocess
from beingvl.images.vqgan import make_processor


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


before = peak_megabytes()
try:
    print(Preprocess(make_processor(512)).crop(read_image(sys.argv[1]), "a").shape)
except InputError as error:
    print(error)
print(peak_megabytes() - before)
