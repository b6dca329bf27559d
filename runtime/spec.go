package runtime

import (
	"fmt"
	"os"
	"path"
	"path/filepath"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// Spec returns the OCI runtime configuration of a container, with Docker's
// defaults for all that Config does not say. id names its cgroup and, without
// a network, its host; root is the lower root's directory, read for the
// user's entry in /etc/passwd and /etc/group. The bundle's directory must
// hold what etcFiles names, and the root file system as "rootfs".
func Spec(c Config, volumes []Mount, id string, root *os.File) (*specs.Spec, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	who, err := identify(c.User, root)
	if err != nil {
		return nil, err
	}
	hostname := c.Hostname
	if hostname == "" {
		if hostname, err = defaultHostname(&c, id); err != nil {
			return nil, err
		}
	}
	mounts, err := bindMounts(volumes)
	if err != nil {
		return nil, err
	}
	s := &specs.Spec{
		Version:  "1.0.2", // what the oldest runtimes in use still accept
		Hostname: hostname,
		Root:     &specs.Root{Path: "rootfs", Readonly: c.ReadonlyRootfs},
		Process: &specs.Process{
			Terminal:     c.Terminal,
			Args:         c.Args,
			Env:          environment(&c, hostname, who.home),
			Cwd:          path.Clean("/" + c.Cwd),
			User:         specs.User{UID: who.uid, GID: who.gid, AdditionalGids: who.groups},
			Capabilities: capabilities(who.uid),
			Rlimits:      rlimits(),
			OOMScoreAdj:  oomScore(),
		},
		Mounts: append(defaultMounts(), mounts...),
		Linux: &specs.Linux{
			Namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace},
				{Type: specs.UTSNamespace}, {Type: specs.MountNamespace}},
			Resources:     &specs.LinuxResources{Devices: deviceRules()},
			MaskedPaths:   maskedPaths,
			ReadonlyPaths: readonlyPaths,
		},
	}
	s.Linux.Seccomp, s.Annotations = seccomp()
	if c.Network == None {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.NetworkNamespace})
	}
	version := cgroupVersion()
	if version != 0 {
		s.Linux.CgroupsPath = cgroupPath(id) // runc makes one even without limits
	}
	if c.limited() {
		if err := limit(s, &c, version); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// DefaultPath is where a container looks for programs if its image does not say.
const DefaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// environment adds to the configured environment what every container has.
func environment(c *Config, hostname, home string) []string {
	env := append([]string(nil), c.Env...)
	env = defaultenv(env, "PATH="+DefaultPath)
	env = defaultenv(env, "HOSTNAME="+hostname)
	env = defaultenv(env, "HOME="+home)
	if c.Terminal {
		env = defaultenv(env, "TERM=xterm")
	}
	return env
}

// bindMounts returns the volumes and the three files of /etc. A volume may
// replace one of those: later mounts lie on top.
func bindMounts(volumes []Mount) ([]specs.Mount, error) {
	var mounts []specs.Mount
	for _, name := range etcFiles {
		mounts = append(mounts, specs.Mount{Destination: "/etc/" + name, Type: "bind", Source: name,
			Options: []string{"rbind", "rprivate"}})
	}
	for _, m := range volumes {
		if !path.IsAbs(m.Destination) || !filepath.IsAbs(m.Source) {
			return nil, fmt.Errorf("volume %s:%s: want absolute paths", m.Source, m.Destination)
		}
		if _, err := os.Stat(m.Source); err != nil {
			return nil, fmt.Errorf("volume %s:%s: %w", m.Source, m.Destination, err)
		}
		o := []string{"rbind", "rprivate"}
		if m.ReadOnly {
			o = append(o, "rro") // "ro" would leave submounts writable
		}
		mounts = append(mounts, specs.Mount{Destination: m.Destination, Type: "bind", Source: m.Source, Options: o})
	}
	return mounts, nil
}

func defaultHostname(c *Config, id string) (string, error) {
	if c.Network == None {
		return id[:min(len(id), 12)], nil
	}
	return os.Hostname()
}
