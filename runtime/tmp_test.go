package runtime
import ("testing";"time";"os";"fmt";"path/filepath")
func TestTmpClose(t *testing.T){
 path,_:=Find("crun"); root,_:=os.Open(newRoot(t)); o:=Options{Runtime:path,StateDir:newState(t),Remove:true,Stderr:os.Stderr}
 var mins [8]time.Duration
 for i:=range 15 { time.Sleep(200*time.Millisecond)
  var tt []time.Time
  mark:=func(){tt=append(tt,time.Now())}
  mark(); c,err:=Start(o); if err!=nil{t.Fatal(err)}
  mark(); c.Run(t.Context(),root,Config{Args:[]string{"/bin/true"}})
  mark(); removeDeviceCgroup(c.ID)
  mark(); removeCgroups(c.ID)
  mark(); os.RemoveAll(filepath.Join(c.Dir,"work"))
  mark(); os.RemoveAll(filepath.Join(c.Dir,"upper"))
  mark(); os.RemoveAll(c.Dir)
  mark(); c.lock.Close()
  c.lock=nil
  for j:=1;j<len(tt);j++ { d:=tt[j].Sub(tt[j-1]); if i==0||d<mins[j]{mins[j]=d} }
 }
 fmt.Println("start,run,devcg,cg,work,upper,all",mins[1:])
}
