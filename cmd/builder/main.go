// Command builder builds a container image from a Dockerfile, without a
// daemon, and pushes it.
package main

import (
	"os"

	"github.com/ondol-dev/ondol/internal/cli"
	"github.com/ondol-dev/ondol/internal/sandbox"
)

func main() {
	sandbox.Init() // does not return in a process that is to run a command
	os.Exit(cli.Run(newCommand()))
}
