// Package cli holds what the command lines of builder and warmer have in
// common: flags, logging, signals and exit codes.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/ondol-dev/ondol/internal/progress"
	"github.com/ondol-dev/ondol/internal/sandbox"
	"github.com/ondol-dev/ondol/pkg/build"
)

// Version is what the version commands print. It is set when a release is
// built.
var Version = "development"

// Interrupted is the cause with which a command's context ends on a signal.
type Interrupted struct{ Signal os.Signal }

func (e *Interrupted) Error() string { return "interrupted by " + e.Signal.String() }

// Run executes the command and returns the exit code of the process. SIGINT
// and SIGTERM end the command's context; a second one ends the process at
// once.
func Run(cmd *cobra.Command) int {
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		cancel(&Interrupted{<-signals})
		<-signals
		os.Exit(exitInterrupted)
	}()
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	err := cmd.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	report(cmd.ErrOrStderr(), err)
	return exitCode(err)
}

const (
	exitFailure     = 1
	exitInterrupted = 130 // as of a shell: 128 and SIGINT
)

// exitCode is the code for an error: that of the command, if a RUN has failed.
func exitCode(err error) int {
	var exit *sandbox.ExitError
	var stop *Interrupted
	switch {
	case errors.As(err, &stop):
		if s, ok := stop.Signal.(syscall.Signal); ok {
			return 128 + int(s)
		}
		return exitInterrupted
	case errors.As(err, &exit):
		return exit.Code
	}
	return exitFailure
}

// report prints the one message with which a command fails, and the lines of
// the Dockerfile that it is about.
func report(w io.Writer, err error) {
	var stop *Interrupted
	if errors.As(err, &stop) {
		fmt.Fprintf(w, "error: %v\n", stop)
		return
	}
	var where *build.Error
	if errors.As(err, &where) && where.Source != "" {
		fmt.Fprintf(w, "%s\n", where.Source)
	}
	fmt.Fprintf(w, "error: %v\n", err)
}

// LogFlags are the flags that say what is printed.
type LogFlags struct {
	verbosity string
	format    string
	timestamp bool
}

// Register adds the flags to a set, with Kaniko's names.
func (f *LogFlags) Register(fs *pflag.FlagSet) {
	fs.StringVarP(&f.verbosity, "verbosity", "v", "info", "what to print: trace, debug, info, warn or error")
	fs.StringVar(&f.format, "log-format", "", "how to print it: text, color or json (default color on a terminal, else text)")
	fs.BoolVar(&f.timestamp, "log-timestamp", false, "print the time of each line")
}

// Reporter returns what the flags ask for, printing to w.
func (f *LogFlags) Reporter(w io.Writer) (*progress.Reporter, error) {
	level, err := progress.ParseLevel(f.verbosity)
	if err != nil {
		return nil, fmt.Errorf("--verbosity: %w", err)
	}
	if f.format == "" {
		f.format = string(progress.Text)
		if file, ok := w.(*os.File); ok && isTerminal(file) {
			f.format = string(progress.Color)
		}
	}
	format, err := progress.ParseFormat(f.format)
	if err != nil {
		return nil, fmt.Errorf("--log-format: %w", err)
	}
	p := progress.NewPrinter(w, format, level)
	p.Timestamps = f.timestamp
	return progress.New(p), nil
}

func isTerminal(f *os.File) bool {
	fi, err := f.Stat()
	return err == nil && fi.Mode()&os.ModeCharDevice != 0
}
