package build

import (
	"context"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/util/system"

	"github.com/ondol-dev/ondol/pkg/cache"
	"github.com/ondol-dev/ondol/pkg/snapshot"
)

// dispatchWorkdir sets the directory for what follows, and makes it.
func (d *dispatcher) dispatchWorkdir(c *instructions.WorkdirCommand) error {
	dir, err := system.NormalizeWorkdir(d.state.config.Config.WorkingDir, c.Path, d.state.config.OS)
	if err != nil {
		return err
	}
	d.state.config.Config.WorkingDir = dir
	if dir == "/" {
		d.commit("WORKDIR "+dir, nil)
		return nil
	}
	st := d.addStep(c.String(), &workdirOp{dir: dir, user: d.state.config.Config.User})
	d.commit("WORKDIR "+dir, st)
	return nil
}

// workdirOp makes a directory and those above it that are missing, owned by
// the user that commands are run as.
type workdirOp struct{ dir, user string }

func (o *workdirOp) sources() []*fileSystem { return nil }

func (o *workdirOp) define(_ context.Context, _ *solver, r *cache.Recipe) error {
	r.Add("instruction", "WORKDIR")
	r.Add("directory", o.dir)
	r.Add("user", o.user)
	return nil
}

func (o *workdirOp) run(ctx context.Context, e *execution) (*layer, error) {
	draft, err := e.draft(ctx)
	if err != nil {
		return nil, err
	}
	owner, err := lookUpOwner(ctx, draft, o.user)
	if err != nil {
		return nil, err
	}
	path, err := snapshot.Resolve(draft, o.dir, true)
	if err != nil {
		return nil, err
	}
	if err := makeDirs(draft, path, 0o755, owner, e.now); err != nil {
		return nil, err
	}
	return e.write(ctx, draft)
}
