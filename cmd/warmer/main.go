// Command warmer brings images onto the volume that the builders of a node
// share, before they are needed.
package main

import (
	"os"

	"github.com/ondol-dev/ondol/internal/cli"
)

func main() { os.Exit(cli.Run(newCommand())) }
